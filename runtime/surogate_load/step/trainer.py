"""Has a transformers `Trainer` make its training steps by `MicroStep`."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from torch import Tensor

from surogate_load.step.micro_step import MicroStep

_LOG = logging.getLogger("surogate_load")


@cache
def captured(trainer: type) -> Any:
    """A subclass of a `Trainer` class whose micro-steps are replayed CUDA graphs where they can be.

        trainer = surogate_load.captured(transformers.Trainer)(model=model, args=args, train_dataset=data)

    Batches should have one shape: pack, or pad to a fixed length and drop the mask. A class or an argument that
    computes the loss in another way than `transformers.Trainer` (TRL's SFTTrainer does), float16 with a loss scaler and
    several processes run as they do without this.
    """
    return type(f"Captured{trainer.__name__}", (_CapturedTrainer, trainer), {"__module__": trainer.__module__})


class _CapturedTrainer:
    _micro_step: MicroStep | None = None
    _said = False

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if not self._can_capture():
            plain: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
            return plain
        model.train()
        batch = dict(self._prepare_inputs(inputs))  # type: ignore[attr-defined]
        scale: float = 1.0
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs:  # type: ignore[attr-defined]
            batch["num_items_in_batch"] = num_items_in_batch
        else:
            scale = 1.0 / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        if self._micro_step is None or self._micro_step.model is not model:
            self._micro_step = MicroStep(model)
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            return self._micro_step(**batch, gradient_scale=scale) * scale

    def _can_capture(self) -> bool:
        from transformers import Trainer

        accelerator = self.accelerator  # type: ignore[attr-defined]
        return (
            type(self).compute_loss is Trainer.compute_loss  # type: ignore[attr-defined]
            and getattr(self, "compute_loss_func", None) is None
            and getattr(self, "label_smoother", None) is None
            and getattr(accelerator, "scaler", None) is None
            and not self._on_several_ranks()
        )

    def _on_several_ranks(self) -> bool:
        several: bool = self.accelerator.distributed_type.name != "NO"  # type: ignore[attr-defined]
        if several and not self._said:
            self._said = True
            _LOG.warning("captured(Trainer) runs eagerly: the model is shared by several processes")
        return several
