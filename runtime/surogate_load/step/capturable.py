"""What a CUDA graph of a micro-step can't hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from surogate_load.experts.module import DOWN
from surogate_load.ops.experts import in_one_launch
from surogate_load.step.checkpointing import why_not_captured
from surogate_load.step.survey import Survey


def why_eager(survey: Survey, batch: Mapping[str, Any]) -> str | None:
    """Why a batch can't be captured; None if it can."""
    model = survey.model
    parameter = next(model.parameters())
    sharded = any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)
    obstacles = {
        f"the model is on {parameter.device}, CUDA graphs are not": parameter.device.type != "cuda",
        "the model is shared by several processes": sharded or isinstance(model, DistributedDataParallel),
        "a mask or position_ids, whose meaning must be read on the host": _has(batch, "attention_mask", "position_ids"),
        "the model is not being trained": not (model.training and torch.is_grad_enabled()),
        "a batch without labels": batch.get("labels") is None,
        "a batch with more than tensors and plain values": any(map(_is_container, batch.values())),
        "experts whose products wait for the device: bfloat16 on compute capability 9.0 or 10 doesn't": _loops(survey),
        "hooks on gradients, which a graph doesn't call": _has_gradient_hooks(survey),
    }
    return next((reason for reason, there in obstacles.items() if there), None) or why_not_captured(survey)


def _has(batch: Mapping[str, Any], *names: str) -> bool:
    return any(batch.get(name) is not None for name in names)


def _is_container(value: Any) -> bool:
    return not (value is None or isinstance(value, (Tensor, bool, int, float, str)))


def _loops(survey: Survey) -> bool:
    return any(not in_one_launch(each.parts(DOWN)[0].device, each.compute_dtype) for each in survey.experts)


def _has_gradient_hooks(survey: Survey) -> bool:
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in survey.trained)
