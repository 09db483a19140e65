"""Gives parameters of a model on the meta device memory, and reads their bytes into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from surogate_load.fused.groups import side_by_side
from surogate_load.linear import QuantizedLinear
from surogate_load.reading.places import Places
from surogate_load.reading.taking import Taken
from surogate_load.reading.threads import Copy, read_copies


def fill(model: nn.Module, ours: Taken, places: Places, device: torch.device) -> None:
    """Fills parameters from files; on the meta device it only has transformers know that they will be filled.

    Tensors of layers that will be multiplied as one share their memory, side by side, so that nothing is copied then.

    Args:
        model: of transformers.
        ours: what fills them.
        places: where that stands.
        device: where they go.

    Raises:
        TruncatedFileError, UnreadableFileError: a file ends too early, or the disk fails.
        torch.OutOfMemoryError: the device has no room.
    """
    copies: list[Copy] = []
    for names in _runs(model, ours):
        parameters = [model.get_parameter(name) for name in names]
        values = [parameter.data for parameter in parameters] if device.type == "meta" else _empty(parameters, device)
        for name, old, value in zip(names, parameters, values, strict=True):
            _put(model, name, old, value)
            if device.type != "meta":
                copies += _copies(value, ours[name], places)
    if copies:
        copies.sort(key=lambda copy: (copy.file, copy.start))
        with tqdm(
            total=sum(len(copy.target) for copy in copies), unit="B", unit_scale=True, desc="Reading weights"
        ) as bar:
            read_copies(copies, device, bar.update)


def _runs(model: nn.Module, ours: Taken) -> Iterator[Sequence[str]]:
    """Each parameter's name once; in one sequence those that should stand side by side."""
    names = {
        (id(module), name): f"{path}.{name}" for path, module in model.named_modules() for name in module._parameters
    }
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    grouped: set[str] = set()
    for run in side_by_side(model, layers):
        found = [names[id(layer), name] for layer, name in run]
        if len(run) > 1 and all(name in ours for name in found):
            grouped.update(found)
            yield found
    yield from ([name] for name in ours if name not in grouped)


def _empty(parameters: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Tensors as these, side by side in one memory where their dtype is the same."""
    if len({parameter.dtype for parameter in parameters}) > 1:
        yield from (torch.empty_like(parameter, device=device) for parameter in parameters)
        return
    sizes = [parameter.numel() for parameter in parameters]
    whole = torch.empty(sum(sizes), dtype=parameters[0].dtype, device=device)
    for parameter, part in zip(parameters, torch.split(whole, sizes), strict=True):
        yield part.view(parameter.shape)


def _put(model: nn.Module, name: str, old: nn.Parameter, value: Tensor) -> None:
    """As transformers does: what it doesn't know to be initialised it fills with random values."""
    path, _, own = name.rpartition(".")
    parameter: Any = nn.Parameter(value, requires_grad=old.requires_grad)
    parameter._is_hf_initialized = True
    model.get_submodule(path)._parameters[own] = parameter


def _copies(value: Tensor, tensors: Sequence[str], places: Places) -> Iterator[Copy]:
    """One for each stored tensor that a parameter is made of."""
    flat = value.reshape(-1).view(torch.uint8)
    start = 0
    for tensor in tensors:
        file, info = places[tensor]
        yield Copy(flat[start : start + info.nbytes], file, info.start)
        start += info.nbytes
