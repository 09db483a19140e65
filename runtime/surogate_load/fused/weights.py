"""Packed weights below each other as one packed weight that dequantizes to the same values, where the format allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from surogate_formats.fp8 import FP8, TILE
from surogate_formats.nf4 import BLOCKS_PER_GROUP, NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_load.weight import WeightKind

Parts = tuple[Tensor, ...]
Fused = tuple[WeightKind, Parts]


def fuse(kinds: Sequence[WeightKind], parts: Sequence[Parts]) -> Fused | None:
    """One weight [sum of N, K] whose rows are those of weights [N, K]; None where it has no packed form.

    Args:
        kinds: of one format with the same parameters and one K.
        parts: of each, in the order of `WeightKind.specs`.

    Returns:
        The kind, and its tensors: the rows of each member's codes are a part of the codes. They share memory with the
        members' where those stand side by side in it.
    """
    fuse_format = _FUSE[type(kinds[0].format)]
    return fuse_format(kinds, parts) if len({(kind.format, kind.shape[1]) for kind in kinds}) == 1 else None


def _shape(kinds: Sequence[WeightKind]) -> tuple[int, int]:
    return sum(kind.shape[0] for kind in kinds), kinds[0].shape[1]


def _below(parts: Sequence[Parts], index: int) -> Tensor:
    """The same part of each, below each other; as bytes, since not every dtype can be concatenated.

    Where they stand so already, as a load puts them, nothing is copied.
    """
    members = [each[index] for each in parts]
    if _adjoin(members):
        rows = sum(len(member) for member in members)
        return members[0].detach().as_strided((rows, *members[0].shape[1:]), members[0].stride())
    joined = torch.cat([member.view(torch.uint8) for member in members])
    return joined.view(members[0].dtype)


def _adjoin(members: Sequence[Tensor]) -> bool:
    """Whether each begins in memory where the one before it ends."""
    ends = [member.data_ptr() + member.nbytes for member in members]
    in_one = len({member.untyped_storage().data_ptr() for member in members}) == 1
    whole = all(member.is_contiguous() and member.numel() for member in members)
    return in_one and whole and [member.data_ptr() for member in members[1:]] == ends[:-1]


def _nf4(kinds: Sequence[WeightKind], parts: Sequence[Parts]) -> Fused | None:
    """Where each member ends with a whole block, and group, the next one may begin."""
    fmt = kinds[0].format
    assert isinstance(fmt, NF4)
    unit = fmt.block_size * (1 if fmt.double_quant == "none" else BLOCKS_PER_GROUP)
    if any(kind.shape[0] * kind.shape[1] % unit for kind in kinds):
        return None
    fused = tuple(_below(parts, index) for index in range(len(parts[0])))
    if fmt.double_quant == "dynamic":  # a nested offset is a member's own: each of its groups gets it
        fused = (*fused[:-1], torch.cat([offset.expand(len(nested)) for *_, nested, offset in parts]))
    return WeightKind(fmt, _shape(kinds)), fused


def _nvfp4(kinds: Sequence[WeightKind], parts: Sequence[Parts]) -> Fused | None:
    """Members of a fused group share their global scale; 16x16 scales stand in 16 rows of scales each."""
    codes, scale, global_scale = range(3)
    if any(not torch.equal(each[global_scale], parts[0][global_scale]) for each in parts):
        return None
    return WeightKind(kinds[0].format, _shape(kinds)), (
        _below(parts, codes),
        _below(parts, scale),
        parts[0][global_scale].clone(),
    )


def _fp8(kinds: Sequence[WeightKind], parts: Sequence[Parts]) -> Fused | None:
    """Members of a fused group share their scale; where they don't, each of a member's rows gets it.

    In float32, as FP8 products take it: what it is in the members' dtype would be cast in each of them.
    """
    fmt = kinds[0].format
    assert isinstance(fmt, FP8)
    codes = _below(parts, 0)
    if fmt.scaling == "tensor":
        alike, fmt = all(torch.equal(scale, parts[0][1]) for _, scale in parts), replace(fmt, scale_dtype="float32")
        if alike:
            return WeightKind(fmt, _shape(kinds)), (codes, parts[0][1].to(torch.float32, copy=True))
        scales = [scale.reshape(1, 1).expand(kind.shape[0], 1) for kind, (_, scale) in zip(kinds, parts, strict=True)]
        return WeightKind(replace(fmt, scaling="channel"), _shape(kinds)), (codes, torch.cat(scales).float())
    if fmt.scaling == "block" and any(kind.shape[0] % TILE for kind in kinds):
        return None
    return WeightKind(fmt, _shape(kinds)), (codes, _below(parts, 1))


_FUSE: dict[type, Callable[[Sequence[WeightKind], Sequence[Parts]], Fused | None]] = {
    NF4: _nf4,
    NVFP4: _nvfp4,
    FP8: _fp8,
}
"""Format to what fuses its weights."""
