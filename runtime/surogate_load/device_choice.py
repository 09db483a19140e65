"""Where a model goes, in which dtype it computes there, and what is said if it doesn't fit."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from surogate_formats.artifact import Artifact
from surogate_load.architecture import one_line
from surogate_load.errors import DeviceMemoryError, DeviceUnavailableError
from surogate_load.weight import TORCH_DTYPES

_LOG = logging.getLogger("surogate_load")

_MULTIPLIES_BFLOAT16 = (8, 0)


def reachable(device: str | torch.device) -> torch.device:
    """The device, once torch has reached it.

    Raises:
        DeviceUnavailableError: it doesn't exist, or torch was built without it.
    """
    try:
        chosen = torch.empty(
            0, device=torch.device(device)
        ).device  # with its index: other threads have another current one
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
        raise DeviceUnavailableError(f"device {device}: {one_line(error)}; choose another, such as cpu") from error
    return chosen


def default_dtype(artifact: Artifact, device: torch.device) -> torch.dtype:
    """The source's dtype; float16 instead of bfloat16 where tensor cores don't take that, and a message says so."""
    dtype = _source_dtype(artifact)
    if dtype != torch.bfloat16 or device.type != "cuda":
        return dtype
    capability = torch.cuda.get_device_capability(device)
    if capability >= _MULTIPLIES_BFLOAT16:
        return dtype
    _LOG.warning(
        "%s has compute capability %d.%d and doesn't multiply bfloat16: computing in float16 (dtype=... chooses)",
        device,
        *capability,
    )
    return torch.float16


def _source_dtype(artifact: Artifact) -> torch.dtype:
    """The dtype that config.json declares, else the commonest of the weights that were quantized."""
    declared = artifact.config.get("dtype") or artifact.config.get("torch_dtype")
    if isinstance(declared, str) and isinstance(getattr(torch, declared, None), torch.dtype):
        dtype: torch.dtype = getattr(torch, declared)
        return dtype
    records = artifact.manifest.tensors.values()
    dtypes = Counter(record.dtype for record in records if record.decision == "quantize")
    return TORCH_DTYPES[dtypes.most_common(1)[0][0]]


@contextmanager
def memory_errors(artifact: Artifact, device: torch.device) -> Iterator[None]:
    """Says what a model needs where it doesn't fit.

    Raises:
        DeviceMemoryError: the device ran out of memory.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = sum(path.stat().st_size for path in artifact.path.glob("*.safetensors"))
        raise DeviceMemoryError(
            f"{device}: no room for {artifact.path}, whose weights take {size / 1e9:.1f} GB; {free / 1e9:.1f} GB were "
            "free: end what else runs there, or choose another device"
        ) from error
