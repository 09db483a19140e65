"""Activation checkpointing around compiled layers, and inside CUDA graphs: there it must not read the random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from surogate_load.step.survey import Survey

_FUNCTION = "_gradient_checkpointing_func"
_CACHES = {"cache", "layer_past"}
"""Names of a cache among transformers' arguments of a layer."""


def why_not_captured(survey: Survey) -> str | None:
    """What keeps a model's checkpointing out of a graph; None if nothing does, or if it checkpoints nothing."""
    layers = [layer for layer in survey.checkpointed if hasattr(layer, _FUNCTION)]
    if not layers:
        return None
    if any(_has_dropout(module) for module in survey.modules if module.training):
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


def checkpoints_itself(layer: nn.Module) -> bool:
    """Whether the layer's own `forward` would checkpoint now; older transformers do it around the whole call."""
    wanted = getattr(layer, "gradient_checkpointing", False) is True and layer.training and torch.is_grad_enabled()
    return wanted and hasattr(layer, _FUNCTION) and type(layer).__call__ is nn.Module.__call__


@contextmanager
def checkpoints_nothing(layer: nn.Module) -> Iterator[None]:
    """The layer without its checkpointing."""
    if getattr(layer, "gradient_checkpointing", False) is not True:
        yield
        return
    setattr(layer, "gradient_checkpointing", False)  # noqa: B010  (a plain attribute, which mypy takes for a module)
    try:
        yield
    finally:
        setattr(layer, "gradient_checkpointing", True)  # noqa: B010


def checkpointed(layer: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function under the layer's checkpointing, without caches, which a second call would fill twice."""
    if kwargs.get("use_cache"):
        kwargs["use_cache"] = False
    if not getattr(layer, "_can_checkpoint_with_cache", False):
        kwargs.update(dict.fromkeys(kwargs.keys() & _CACHES))
    return getattr(layer, _FUNCTION)(partial(function, **kwargs), *args)


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
