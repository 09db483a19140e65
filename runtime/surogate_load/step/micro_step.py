"""A micro-step, forward, loss and backward, as one CUDA graph: the host launches it at once instead of 3000 kernels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surogate_load.step.capturable import why_eager
from surogate_load.step.capture import Capture, Gradients
from surogate_load.step.survey import Survey

_LOG = logging.getLogger("surogate_load")


class MicroStep:
    """Calls a model for its loss and adds the gradients to the parameters', by a CUDA graph where it can.

    The first batch of a shape is captured (a few steps of time, and memory for one step's activations); later ones of
    that shape are copied to where the graph reads, and replayed. Other shapes, once `graphs` are captured, and what a
    graph can't hold run eagerly, with one message that says why. Any optimizer, clipping and accumulation go around it:

        step = surogate_load.MicroStep(model)
        for batch in batches:
            step(**batch, gradient_scale=1 / accumulation)

    Gradients live in buffers of this object, also after `zero_grad(set_to_none=True)`. Packed sequences of one length
    gain most. An `attention_mask` of nothing but ones is dropped; looking at one on the GPU waits for it.

    Args:
        model: with quantized layers, on one device. Its train mode, adapters, their scaling, recipe and checkpointing
            may change, which captures anew; after other changes (modules, hooks, dropout) call `reset`.
        graphs: how many shapes are captured.
    """

    def __init__(self, model: nn.Module, graphs: int = 1) -> None:
        """Captures nothing yet."""
        self.model = model
        self.graphs = graphs
        self._captures: dict[Any, Capture] = {}
        self._gradients: Gradients | None = None
        self._survey: Survey | None = None
        self._state: tuple[Any, ...] = ()
        self._said: set[str] = set()

    def __call__(self, *, gradient_scale: Tensor | float = 1.0, **batch: Any) -> Tensor:
        """Runs one micro-step.

        Args:
            gradient_scale: multiplies the gradients, as dividing the loss would.
            batch: what the model's forward takes; with labels. Tensors, and None or plain values.

        Returns:
            The loss, not scaled, float [], without a graph; not yet computed when this returns.
        """
        batch = _without_full_mask(batch)
        survey = self._surveyed()
        reason = why_eager(survey, batch)
        if reason is None:
            device = next(self.model.parameters()).device
            given = {**_on_device(batch, device), "gradient_scale": _scalar(gradient_scale, device)}
            captured = self._captured(given, survey)
            if captured is not None:
                return captured.replay(given)
            reason = f"another shape, after {self.graphs} captured"
        else:
            self._survey = None  # what was in the way may go
        self._say(reason)
        loss: Tensor = self.model(**batch).loss
        (loss * gradient_scale).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def reset(self) -> None:
        """Forgets what was captured, and frees its memory."""
        self._captures.clear()
        self._gradients = self._survey = None

    def _surveyed(self) -> Survey:
        """What the model holds; forgets what was captured if it trains otherwise now."""
        if self._survey is None or self._survey.model is not self.model:
            self._survey = Survey(self.model)
        state = self._survey.state()
        if state != self._state:
            self.reset()
            self._survey = Survey(self.model)
            self._state = self._survey.state()
        return self._survey

    def _captured(self, given: dict[str, Any], survey: Survey) -> Capture | None:
        if self._gradients is None:
            self._gradients = Gradients(survey.trained)
        key = _key(given)
        if key not in self._captures and len(self._captures) < self.graphs:
            self._captures[key] = Capture(self.model, given, self._gradients)
        return self._captures.get(key)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _LOG.warning("MicroStep runs eagerly: %s", reason)


def _without_full_mask(batch: dict[str, Any]) -> dict[str, Any]:
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all()):
        return {name: value for name, value in batch.items() if name != "attention_mask"}
    return batch


def _on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors on the device; a number that differs from batch to batch becomes one."""
    given = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor):
            given[name] = value.to(device, non_blocking=True)
        elif name == "num_items_in_batch" and value is not None:
            given[name] = _scalar(value, device)
    return given


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """A number on the device; filled in there, since copying it would wait for all that is queued."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return torch.full((), value, device=device)


def _key(given: Mapping[str, Any]) -> tuple[Any, ...]:
    device = "cuda"
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    entries = ((name, (v.shape, v.dtype) if isinstance(v, Tensor) else v) for name, v in sorted(given.items()))
    return (autocast, *entries)
