"""The parts of packed weights among a checkpoint's tensors: what is missing or other than it must be is named."""

from __future__ import annotations

from surogate_formats.checkpoint import TensorInfo
from surogate_formats.checkpoint.errors import shown
from surogate_formats.errors import ArtifactError
from surogate_formats.format import TensorSpec

STATE = "weight.quant_state.bitsandbytes__nf4"
"""Ending of bitsandbytes' quantization state: a text, whose length says nothing."""


class UnscaledWeightError(ArtifactError):
    """A tensor of few bits stands without its scale: what its values are, nobody can tell."""


class UnreadableWeightError(ArtifactError):
    """A packed weight has a part of another dtype or shape than its format's, or one whose meaning isn't known."""


def fits(found: TensorInfo, spec: TensorSpec) -> bool:
    """Whether a tensor is of a spec's dtype and shape; a single value may be [] or [1], a text of any length."""
    single = found.shape in ((), (1,)) and spec.shape in ((), (1,))
    text = found.name.endswith(f".{STATE}") and len(found.shape) == 1
    return found.dtype == spec.dtype and (found.shape == spec.shape or single or text)


def check_part(name: str, found: TensorInfo | None, spec: TensorSpec, codes: str) -> None:
    """Raises where a part, of the weight whose codes are called so, is missing or doesn't fit."""
    if found is None:
        raise UnscaledWeightError(
            f"{shown(codes)} has no {shown(name)}, without which its values are unknown; download the checkpoint again"
        )
    if not fits(found, spec):
        raise UnreadableWeightError(
            f"{shown(name)} is {found.dtype} {list(found.shape)}, "
            f"expected {spec.dtype} {list(spec.shape)}: is it packed as config.json says?"
        )
