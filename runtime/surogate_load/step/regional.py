"""Compiles a model's decoder layers, one compilation for all that are alike, and leaves the rest as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._functorch import config as functorch

from surogate_load.errors import NoLayersError
from surogate_load.step.attention import fastest_attention
from surogate_load.step.checkpointing import checkpointed, checkpoints_itself, checkpoints_nothing

LARGE = 4096
"""Hidden size from which computing a little again costs little beside the products: 2 % at 8B, but 4 % at 0.6B."""

VARIANTS = 16
"""Compilations of a layer's code, at most: the first layer and others, one length and any, training and evaluation."""

SAVED_IF_LARGE = 0.95
"""What of a large layer's activations is saved by default; at 8B that takes 6 GB off 28."""


_SETTINGS = "_surogate_compiled"


def compile_layers(model: nn.Module, activation_memory: float | None = None, **options: Any) -> None:
    """Compiles every decoder layer on its first call, without graph breaks; adapters may be added until then.

    Args:
        model: of transformers.
        activation_memory: torch's `activation_memory_budget`: from 1, where the backward computes next to nothing
            again, down to 0, where it computes everything again; the cheapest (norms, activation functions) goes first.
            By default 1, and for hidden sizes from 4096 on .95.
        options: of `torch.compile`.

    Raises:
        NoLayersError: the model names no such layers.
    """
    layers = list(decoder_layers(model))
    if not layers:
        raise NoLayersError(f"{type(model).__name__} has no decoder layers to compile: leave compile out")
    if activation_memory is None:
        hidden = getattr(model.config.get_text_config(), "hidden_size", 0)  # type: ignore[operator, union-attr]
        activation_memory = SAVED_IF_LARGE if hidden >= LARGE else 1.0
    for layer in layers:
        layer.compile(**{"fullgraph": True, **options})
        layer._compiled_call_impl = _around(layer, layer._compiled_call_impl, activation_memory)  # type: ignore[arg-type]
        vars(layer)[_SETTINGS] = {"fullgraph": True, **options}, activation_memory


def compiled_inside_hooks(layer: nn.Module) -> None:
    """Has a layer that `compile_layers` compiled run its hooks outside of the compiled code, as FSDP's must."""
    if layer._compiled_call_impl is None or _SETTINGS not in vars(layer):
        return
    options, activation_memory = vars(layer)[_SETTINGS]
    layer._compiled_call_impl = None
    layer.forward = _around(layer, torch.compile(layer.forward, **options), activation_memory)


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the classes that a transformers model never splits between devices."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in names:
            yield module


def _around(layer: nn.Module, call: Callable[..., Any], activation_memory: float) -> Callable[..., Any]:
    """The compiled call with what must hold while it is traced, and inside a layer's checkpoint, not around it.

    dynamo refuses checkpoints around what merged projections keep between their members' calls.
    """

    def compiled(*args: Any, **kwargs: Any) -> Any:
        with fastest_attention(), checkpoints_nothing(layer), _configured(activation_memory):
            return call(*args, **kwargs)

    @wraps(call)
    def call_or_checkpoint(*args: Any, **kwargs: Any) -> Any:
        if checkpoints_itself(layer):
            return checkpointed(layer, compiled, *args, **kwargs)
        return compiled(*args, **kwargs)

    return call_or_checkpoint


@contextmanager
def _configured(activation_memory: float) -> Iterator[None]:
    """Settings while a layer is compiled; what is as wanted isn't set, which takes microseconds at every call."""
    wanted: list[tuple[Any, str, Any]] = [(functorch, "activation_memory_budget", activation_memory)]
    wanted.append((dynamo, "recompile_limit", max(dynamo.recompile_limit, VARIANTS)))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # A layer is too small to be cut at DDP's buckets, and layers under FSDP differ as they do without it.
        wanted += [(dynamo, "optimize_ddp", False), (dynamo, "skip_fsdp_guards", False)]
    before = [(module, name, getattr(module, name)) for module, name, _ in wanted]
    changed = [index for index, (_, _, value) in enumerate(wanted) if value != before[index][-1]]
    _set(wanted[index] for index in changed)
    try:
        yield
    finally:
        _set(before[index] for index in changed)


def _set(settings: Iterable[tuple[Any, str, Any]]) -> None:
    for module, name, value in settings:
        setattr(module, name, value)
