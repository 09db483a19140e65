"""Has a transformers model make its loss in chunks: `model(labels=...).loss` without logits, which come on access.

The model's own `forward` runs. Meanwhile its head gives back the hidden states it got, and what the model takes for its
loss function finds out whether they arrive there as they left: then the logits would have, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from surogate_load.loss.lazy_logits import with_lazy_logits
from surogate_load.loss.linear_cross_entropy import PLAIN, LogitTransform, linear_cross_entropy
from surogate_load.quick_walks import QuickWalks

_LOG = logging.getLogger("surogate_load")


class _UnknownTransformError(Exception):
    """The model does something to its logits that isn't known here."""


class _Interception:
    """One forward whose head is left out."""

    def __init__(self, head: nn.Linear, transform: LogitTransform | None) -> None:
        self.head = head
        self.transform = transform
        self.used = PLAIN
        self.hidden: Tensor | None = None

    def keep(self, hidden: Tensor) -> Tensor:
        """In place of the head's forward."""
        self.hidden = hidden
        return hidden

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """In place of transformers' loss function, with its arguments."""
        hidden = self.hidden
        transform = PLAIN if logits is hidden else self.transform
        if hidden is None or transform is None or kwargs.get("label_smoothing"):
            raise _UnknownTransformError
        self.used = transform
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        device, weight = hidden.device.type, self.head.weight
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        rows, targets = hidden.reshape(-1, hidden.shape[-1]).to(dtype), shift_labels.reshape(-1).to(hidden.device)
        with torch.autocast(device, enabled=False):
            return linear_cross_entropy(rows, weight.to(dtype), targets, num_items_in_batch, ignore_index, transform)

    def logits(self) -> Tensor:
        """What the model would have made of the hidden states."""
        assert self.hidden is not None
        logits: Tensor = self.head(self.hidden.to(self.head.weight.dtype))
        return logits if self.used is PLAIN else self.used.apply(logits.float()).to(logits.dtype)


class FusedHead:
    """Mixed into a model's class by `fuse_head`."""

    _interception: _Interception | None = None
    _unfusable = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; its loss in chunks where the head is frozen and nothing listens to it."""
        plain = super().forward  # type: ignore[misc]
        if self.training and kwargs.get("labels") is not None:  # type: ignore[attr-defined]
            kwargs.setdefault(
                "use_cache", False
            )  # nobody reads a training step's cache; compiled code would differ by it
        head = _frozen_head(self) if kwargs.get("labels") is not None else None
        if head is None or kwargs.get("logits_to_keep") or kwargs.get("return_dict") is False:
            return plain(*args, **kwargs)
        try:
            with self._intercept(head) as interception:
                output = plain(*args, **kwargs)
        except _UnknownTransformError:
            type(self)._unfusable = True
            _LOG.warning(
                "%s changes its logits in a way that is not known here: they are made whole", type(self).__name__
            )
            return plain(*args, **kwargs)
        return with_lazy_logits(output, interception.logits)

    @property
    def loss_function(self) -> Any:
        """The model's, or what stands in for it during a forward without logits."""
        return super().loss_function if self._interception is None else self._interception.loss  # type: ignore[misc]

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles by the model's own class: the one made here has no name of its own."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (type(self).__bases__[-1],), *reduced[2:])

    @contextmanager
    def _intercept(self, head: nn.Linear) -> Iterator[_Interception]:
        interception = _Interception(head, known_transform(self.config))  # type: ignore[attr-defined]
        head.forward = interception.keep  # type: ignore[method-assign, assignment]
        self._interception = interception
        try:
            yield interception
        finally:
            del head.forward
            self._interception = None


def fuse_head(model: nn.Module) -> None:
    """Gives a model with a linear `lm_head` a class of the same name that makes its loss in chunks."""
    if not isinstance(model, FusedHead) and isinstance(getattr(model, "lm_head", None), nn.Linear):
        model.__class__ = _fused_class(type(model))  # type: ignore[arg-type]


@cache
def _fused_class(base: type) -> type:
    @wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: FusedHead, *args: Any, **kwargs: Any) -> Any:
        return FusedHead.forward(self, *args, **kwargs)

    entries = {"__module__": base.__module__, "__doc__": base.__doc__, "forward": forward}
    return type(base.__name__, (FusedHead, QuickWalks, base), entries)


def _new(base: type) -> Any:
    made: Any = _fused_class(base)
    return made.__new__(made)


def known_transform(config: Any) -> LogitTransform | None:
    """What models with these entries in their config do to logits; None: nothing that is known."""
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if cap is None and scale is None and divisor is None:
        return None
    return LogitTransform((scale or 1.0) / (divisor or 1.0), cap)


def _frozen_head(model: Any) -> nn.Linear | None:
    """The head, if a loss in chunks gives all that a training step takes from it."""
    head = model.lm_head
    usable = (
        not type(model)._unfusable
        and model.training
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(head) is nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
        and "forward" not in vars(head)  # accelerate's hooks stand there
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
        and model.loss_function is ForCausalLMLoss
    )
    return head if usable else None
