"""Activation checkpointing inside a CUDA graph: it must not look at the random state, which it does on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

_FUNCTION = "_gradient_checkpointing_func"


def why_not_captured(model: nn.Module) -> str | None:
    """What keeps a model's checkpointing out of a graph; None if nothing does, or if it checkpoints nothing."""
    layers = list(_checkpointed(model))
    if not layers:
        return None
    if any(_has_dropout(module) for module in model.modules() if module.training):
        return "activation checkpointing with dropout, whose random state is read on the host"
    if not all(_is_plain(getattr(layer, _FUNCTION)) for layer in layers):
        return "activation checkpointing in another way than torch's with use_reentrant=False"
    return None


@contextmanager
def without_random_state(model: nn.Module) -> Iterator[None]:
    """Has checkpointed layers leave the random state alone; only where `why_not_captured` finds nothing."""
    layers = list(_checkpointed(model))
    originals = [getattr(layer, _FUNCTION) for layer in layers]
    for layer, original in zip(layers, originals, strict=True):
        setattr(layer, _FUNCTION, partial(original, preserve_rng_state=False))
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            setattr(layer, _FUNCTION, original)


def _checkpointed(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True and hasattr(module, _FUNCTION):
            yield module


def _is_plain(function: Any) -> bool:
    plain = isinstance(function, partial) and function.func is checkpoint
    return plain and function.keywords.get("use_reentrant") is False


def _has_dropout(module: nn.Module) -> bool:
    """Layers keep a probability as a number, called `dropout`, `attention_dropout` or the like."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any("dropout" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())
