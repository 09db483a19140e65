"""Compiles a model's decoder layers, one compilation for all that are alike, and leaves the rest as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from torch import nn

from surogate_load.errors import NoLayersError
from surogate_load.step.attention import fastest_attention


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compiles every decoder layer on its first call, without graph breaks; adapters may be added until then.

    Args:
        model: of transformers.
        options: of `torch.compile`.

    Raises:
        NoLayersError: the model names no such layers.
    """
    layers = list(decoder_layers(model))
    if not layers:
        raise NoLayersError(f"{type(model).__name__} has no decoder layers to compile: leave compile out")
    for layer in layers:
        layer.compile(**{"fullgraph": True, **options})
        layer._compiled_call_impl = _with_fastest_attention(layer._compiled_call_impl)  # type: ignore[arg-type]


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the classes that a transformers model never splits between devices."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in names:
            yield module


def _with_fastest_attention(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with fastest_attention():  # the kernel is chosen when the layer is traced
            return call(*args, **kwargs)

    return inside
