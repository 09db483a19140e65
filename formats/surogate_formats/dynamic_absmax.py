"""bitsandbytes' double quantization: absmax in 8 bits of the dynamic data type, around one mean a weight.

Its readers restore what is stored here and no other way, so a restored absmax may be negative beside an outlier, where
the mean is far above the small ones.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surogate_formats.format import Parts

F32 = NDArray[np.float32]

NESTED_BLOCK = 256
"""Consecutive blocks whose absmax share one nested absmax."""

_POSITIVE = (
    "3513a3b7365a1a94370205ff37b2420638378034388aefb338ba1f4b3923d70b398ce70539c7e2833a016f013a1eecc13a3c6a80"
    "3a59e83e3a7765ff3aa7ef9d3af1a9fc3b1db22d3b428f5c3b676c8a3b8624dd3b9893743bab020d3bbd70a43bcfdf3b3be24dd3"
    "3bf4bc6a3c0395813c0ccccd3c1604183c1f3b643c3ae1483c68f5c33c8b851f3ca28f5d3cb9999a3cd0a3d73ce7ae153cfeb852"
    "3d0ae1483d1666673d21eb853d2d70a33d38f5c33d447ae13d5000003d5b851f3d670a3d3d728f5d3d7e147b3d84cccd3d8a8f5d"
    "3d9051eb3d96147b3d9bd70a3da1999a3da75c2a3dad1eb83db2e1483db8a3d73dbe66673dc428f73dc9eb853ddb33343df80000"
    "3e0a66663e18cccd3e2733333e35999a3e4400003e5266663e60cccd3e6f33333e7d99993e8600003e8d33343e9466663e9b999a"
    "3ea2cccc3eaa00003eb133333eb866663ebf999a3ec6cccc3ece00003ed533333edc66663ee3999a3eeacccc3ef200003ef93332"
    "3f0033333f03cccc3f0766663f0b00003f0e999a3f1233343f15cccd3f1966663f1d00003f20999a3f2433343f27cccd3f2b6666"
    "3f2f00003f32999a3f3633343f39cccd3f3d66663f4100003f44999a3f4833333f4bcccd3f4f66663f5300003f56999a3f5a3333"
    "3f5dcccd3f6166663f6500003f68999a3f6c33333f6fcccd3f7366663f7700003f7a999a3f7e3333"
)

_MAGNITUDES: F32 = np.frombuffer(bytes.fromhex(_POSITIVE), ">f4").astype(np.float32)

DYNAMIC_MAP: F32 = np.concatenate([-_MAGNITUDES[::-1], [np.float32(0)], _MAGNITUDES, [np.float32(1)]])
"""The signed dynamic 8-bit data type (arXiv:1511.04561), float32 [256] ascending: 0.1 to 1 of each power of ten from 1
to 10^-6 in 64, 32, ... 1 steps, with both signs; 0; 1. Written out, since bitsandbytes' own values carry the rounding
of the library that computed them."""

DYNAMIC_MIDPOINTS: F32 = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / np.float32(2)
"""Decision thresholds between neighbouring codes, float32 [255]; a value on a threshold takes the lower code."""

NESTED_STEPS = 64
"""The nested absmax divided by this is a little more than the widest step of the map."""

NESTED_FLOOR = np.float32(1e-38)
"""Below this the reciprocal of a nested absmax would overflow."""


def mean_absmax(absmax: F32) -> np.float32:
    """The mean of float32 [nb], summed one after the other in float64 and rounded once; 0 of nothing."""
    if not absmax.size:
        return np.float32(0)
    total = np.add.accumulate(absmax, dtype=np.float64)[-1]
    return np.float32(total / absmax.size)


def quantize_dynamic(absmax: F32) -> Parts:
    """Double quantization of float32 [nb]: the nearest values of the map to (absmax - mean) / nested absmax."""
    offset = mean_absmax(absmax)
    groups = -(-absmax.size // NESTED_BLOCK)
    centred = np.pad(absmax - offset, (0, groups * NESTED_BLOCK - absmax.size)).reshape(groups, NESTED_BLOCK)
    nested: F32 = np.max(np.abs(centred), axis=1)
    return {
        "absmax": dynamic_codes(absmax, nested, offset),
        "nested_absmax": nested,
        "nested_offset": np.array([offset]),
    }


def dynamic_codes(absmax: F32, nested: F32, offset: np.float32) -> NDArray[np.uint8]:
    """The codes of float32 [nb] under a nested absmax, float32 [groups], and an offset."""
    inverse = np.float32(1) / np.maximum(nested, NESTED_FLOOR)
    with np.errstate(over="ignore"):
        normalized = (absmax - offset) * inverse[np.arange(absmax.size) // NESTED_BLOCK]
    return np.searchsorted(DYNAMIC_MIDPOINTS, normalized, side="left").astype(np.uint8)


def restore_dynamic(parts: Parts) -> F32:
    """float32 [nb]: fl(fl(map[code] * nested absmax) + offset)."""
    codes = parts["absmax"]
    group = np.arange(codes.size) // NESTED_BLOCK
    restored: F32 = DYNAMIC_MAP[codes] * parts["nested_absmax"][group] + parts["nested_offset"][0]
    return restored


def restore_rounded(parts: Parts) -> F32:
    """float32 [nb] where the nesting is in bfloat16: product, offset and sum are rounded to it, one after the other."""
    codes = parts["absmax"]
    group = np.arange(codes.size) // NESTED_BLOCK
    product = _bfloat16(DYNAMIC_MAP[codes] * parts["nested_absmax"][group])
    return _bfloat16(product + _bfloat16(parts["nested_offset"]))


def _bfloat16(values: F32) -> F32:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)
