"""Which devices multiply in a recipe's types."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from surogate_formats.recipe import Recipe
from surogate_load.errors import BackendUnavailableError, UnsupportedDeviceError

NEEDED_CAPABILITY = {"fp8-hybrid": (8, 9), "nvfp4": (10, 0)}
"""The least CUDA compute capability whose tensor cores take the recipe's operands; others run anywhere."""

_ADVICE = "pass emulate=True to compute the same numbers in float32, slowly, or use recipe bf16"


def check_device(recipe: Recipe, device: torch.device) -> None:
    """Raises unless the device can run the recipe without emulation.

    Raises:
        UnsupportedDeviceError: it can't; the message names the compute capability needed and had.
        BackendUnavailableError: nothing here multiplies through `backend`.
    """
    needed = NEEDED_CAPABILITY.get(recipe.name)
    if needed is None:
        return
    if device.type == "meta":  # where the model will be filled
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if has is None or has < needed:
        found = f"has {_dotted(has)}" if has else "is no CUDA device"
        raise UnsupportedDeviceError(
            f"recipe {recipe.name} needs CUDA compute capability {_dotted(needed)}, {device} {found}: {_ADVICE}"
        )
    if recipe.name == "nvfp4" and recipe.backend == "cudnn":
        missing = "" if find_spec("cudnn") else "nvidia-cudnn-frontend is not installed, and "
        raise BackendUnavailableError(
            f"backend cudnn: {missing}this version has no products of cuDNN: use backend cutlass or emulate=True"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
