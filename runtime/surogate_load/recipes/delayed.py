"""Delayed scaling: fp8 scales from the amax of earlier steps (the scheme of NVIDIA's Transformer Engine).

A step is an optimizer's step. Until then amax is max-recorded into a current slot, which is idempotent under
recomputation and adds up over gradient accumulation; after it the ring is rolled and the scale renewed, on the device,
without a read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from surogate_formats.recipe import Recipe
from surogate_load.errors import CopiedModelError
from surogate_load.ops.quantize_fp8 import LARGEST_SCALE, SMALLEST_SCALE
from surogate_load.ops.rounding import FP8_MAX
from surogate_load.placement import FixedDtypeModule

_LOG = logging.getLogger("surogate_load")

SUSPICIOUS_STEPS = 2
"""Steps of others' optimizers, each after a training step of the model, before they are taken for its own."""

_DONE = -1
_WATCHED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Roots in order (ranks must reduce alike), with the suspicious steps counted so far; `_DONE` once that is settled."""

_HOOKS: list[Any] = []


class DelayedScale(FixedDtypeModule):
    """The scaling state of one fp8 operand.

    Attributes:
        history: float32 [amax_history_len], the ring, newest last.
        current: float32 [1], the largest amax since the last step.
        scale: float32 [1], the encoding scale; 0 until the first step has ended: each use then takes its own amax.
        reach: fmax * 2^-margin.
        recipe: by whose switches a step ends.
    """

    history: Tensor
    current: Tensor
    scale: Tensor

    def __init__(self, dtype: torch.dtype, recipe: Recipe) -> None:
        """State for operands of an fp8 dtype."""
        super().__init__()
        self.register_buffer("history", torch.zeros(recipe.amax_history_len))
        self.register_buffer("current", torch.zeros(1))
        self.register_buffer("scale", torch.zeros(1))
        self.reach = FP8_MAX[dtype] * 2.0**-recipe.margin
        self.recipe = recipe
        self.watched = False

    def state(self) -> tuple[Tensor, Tensor]:
        """(scale, current), what the quantizing op takes."""
        return self.scale, self.current

    def check_watched(self) -> None:
        """Raises `CopiedModelError` in a copy: no optimizer step would ever renew its scale."""
        if not self.watched:
            raise CopiedModelError(
                "a copy of a model can't train under recipe fp8-hybrid as it stands: "
                "call surogate_load.set_recipe(copy, recipe) first"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy isn't known to the hook that ends steps."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.watched = False


def watch(model: nn.Module) -> None:
    """Renews the model's scales after each step of an optimizer that owns parameters of it; a weak reference.

    Roots inside this one are forgotten: whatever steps them steps this one. A root around it stays, for its other
    layers.
    """
    for module in model.modules():
        _WATCHED.pop(module, None)
    scales = delayed_scales(model)
    if not scales:
        return
    for scale in scales:
        scale.watched = True
    _WATCHED[model] = 0
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_post_hook(_after_step))


def delayed_scales(model: nn.Module) -> list[DelayedScale]:
    """Every scaling state of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, DelayedScale)]


def end_step(model: nn.Module) -> None:
    """Ends a training step of a model by hand: renews its fp8 scales from the amax recorded since the last one.

    Needed only where the optimizer owns copies of the parameters (DeepSpeed): else the step of any torch optimizer that
    owns parameters of the model does it. Call it after the optimizer's step, on every rank.
    A second call in a step changes nothing, and so does one under a recipe without delayed scaling.
    """
    ended: set[DelayedScale] = set()
    _end_steps(model, ended)
    for root in list(_WATCHED):
        if not ended.isdisjoint(delayed_scales(root)):
            _WATCHED[root] = _DONE


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    ended: set[DelayedScale] = set()
    for model in list(_WATCHED):
        if any(id(parameter) in owned for parameter in model.parameters()):
            _WATCHED[model] = _DONE
            _end_steps(model, ended)
        else:
            _suspect_copies(model)


def _end_steps(model: nn.Module, ended: set[DelayedScale]) -> None:
    """Ends the step of every scale of a model but those that have `ended`: roots can share layers."""
    by_recipe: dict[Recipe, list[DelayedScale]] = {}
    for scale in delayed_scales(model):
        if scale not in ended:
            by_recipe.setdefault(scale.recipe, []).append(scale)
    for recipe, scales in by_recipe.items():
        renew(scales, recipe)
        ended.update(scales)


def _suspect_copies(model: nn.Module) -> None:
    """Warns once where the model trains and other optimizers step, but none that owns its parameters ever has."""
    if _WATCHED[model] == _DONE or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    if not any(bool(scale.current > 0) for scale in delayed_scales(model)):
        return
    _WATCHED[model] += 1
    if _WATCHED[model] == SUSPICIOUS_STEPS:
        _LOG.warning(
            "recipe fp8-hybrid: optimizers step, but none owns parameters of this model: its scales are never renewed; "
            "if yours steps copies of them (DeepSpeed), call surogate_load.end_step(model) after each step"
        )
        _WATCHED[model] = _DONE


@torch.no_grad()
def renew(scales: Sequence[DelayedScale], recipe: Recipe) -> None:
    """Rolls the rings and renews the scales; nothing changes where nothing was recorded since the last step.

    An amax that isn't finite is left out: in the ring it would freeze the scale for the length of the window.
    """
    current = torch.cat([scale.current for scale in scales])
    current = torch.where(torch.isfinite(current), current, 0.0)
    if recipe.reduce_amax and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(current, op=torch.distributed.ReduceOp.MAX)
    stepped = (current > 0).any()
    history = torch.stack([scale.history for scale in scales])
    history = torch.where(stepped, torch.cat((history[:, 1:], current[:, None]), dim=1), history)
    effective = history.amax(dim=1) if recipe.amax_compute_algo == "max" else history[:, -1]
    reach = torch.tensor([scale.reach for scale in scales], device=current.device)
    renewed = (reach / effective).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    old = torch.cat([scale.scale for scale in scales])
    renewed = torch.where(stepped & (effective > 0), renewed, old)
    torch._foreach_copy_([scale.history for scale in scales], list(history.unbind()))
    torch._foreach_copy_([scale.scale for scale in scales], list(renewed[:, None].unbind()))
    torch._foreach_zero_([scale.current for scale in scales])
