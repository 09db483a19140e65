"""Double quantization of NF4's absmax: in signed steps around a group's mid-range, or as bitsandbytes has it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surogate_formats.dynamic_absmax import NESTED_BLOCK, NESTED_STEPS, dynamic_codes, restore_dynamic
from surogate_formats.format import Parts

F32 = NDArray[np.float32]

BLOCKS_PER_GROUP = NESTED_BLOCK
"""Consecutive blocks whose absmax share what reverses their double quantization, of either kind."""


def quantize_absmax(absmax: F32) -> Parts:
    """Double quantization of float32 [nb]: 8 bits a block around the mid-range of each group of 256.

    The mid-range, not the mean: beside one outlier block the mean pushes the small absmax of its group below zero,
    which would flip the sign of all their weights.
    """
    groups = -(-absmax.size // BLOCKS_PER_GROUP)
    padded = np.pad(absmax, (0, groups * BLOCKS_PER_GROUP - absmax.size), mode="edge").reshape(groups, BLOCKS_PER_GROUP)
    low, high = padded.min(axis=1), padded.max(axis=1)
    offset = low / np.float32(2) + high / np.float32(2)
    scale = (high - low) / np.float32(254)
    return {"absmax": affine_steps(absmax, scale, offset), "absmax_scale": scale, "absmax_offset": offset}


def affine_steps(absmax: F32, scale: F32, offset: F32) -> NDArray[np.uint8]:
    """What is stored for float32 [nb] under the scales and offsets of their groups, float32 [ng]."""
    group = np.arange(absmax.size) // BLOCKS_PER_GROUP
    divisor, flat = np.where(scale == 0, np.float32(1), scale), scale == 0
    with np.errstate(over="ignore"):
        steps = np.clip(np.rint((absmax - offset[group]) / divisor[group]), -127, 127)
    stored: NDArray[np.uint8] = (np.where(flat[group], np.float32(0), steps) + 128).astype(np.uint8)
    return stored


def legal_absmax(parts: Parts, wanted: F32) -> NDArray[Any]:
    """What is stored for the legal absmax next to float32 [nb], under the double quantization of the parts."""
    if "nested_absmax" in parts:
        return dynamic_codes(wanted, parts["nested_absmax"], parts["nested_offset"][0])
    if "absmax_scale" in parts:
        return affine_steps(wanted, parts["absmax_scale"], parts["absmax_offset"])
    return wanted


def grain(parts: Parts, blocks: int) -> F32:
    """How far legal values of absmax may stand apart, float32 [nb]; 0 where all are legal."""
    group = np.arange(blocks) // BLOCKS_PER_GROUP
    if "nested_absmax" in parts:
        nested: F32 = parts["nested_absmax"][group]
        return nested * np.float32(1 / NESTED_STEPS)
    if "absmax_scale" in parts:
        scale: F32 = parts["absmax_scale"][group]
        return scale
    return np.zeros(blocks, np.float32)


def block_absmax(parts: Parts) -> F32:
    """The float32 [nb] absmax that decodes the codes; reverses the double quantization where there is one."""
    if "nested_absmax" in parts:
        return restore_dynamic(parts)
    if "absmax_scale" not in parts:
        stored: NDArray[Any] = parts["absmax"]
        return stored
    steps = parts["absmax"].astype(np.float32) - np.float32(128)
    group = np.arange(steps.size) // BLOCKS_PER_GROUP
    restored: F32 = steps * parts["absmax_scale"][group] + parts["absmax_offset"][group]
    return np.maximum(restored, np.float32(0))
