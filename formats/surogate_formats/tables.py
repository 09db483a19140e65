"""The value tables of the formats: written once here, generated from here wherever a kernel needs them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NF4_CODEBOOK: NDArray[np.float32] = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)
"""NF4 values by code 0..15, float32 [16] (QLoRA, arXiv:2305.14314, appendix E)."""

NF4_MIDPOINTS: NDArray[np.float32] = (NF4_CODEBOOK[:-1] + NF4_CODEBOOK[1:]) / np.float32(2)
"""Decision thresholds between neighbouring NF4 codes, float32 [15]; a value on a threshold takes the lower code."""

NF4_ZERO_CODE = 7
"""The NF4 code that stands for 0: it fills blocks without magnitude and the last nibble of an odd count."""

E2M1_VALUES: NDArray[np.float32] = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0],
    dtype=np.float32,
)
"""E2M1 values by code (sign << 3 | magnitude index), float32 [16] (OCP Microscaling Formats v1.0, 5.3.3)."""

E2M1_MAX = np.float32(6.0)
E4M3_MAX = np.float32(448.0)
LARGEST_BLOCK_SCALE: dict[bool, np.float32] = {False: E4M3_MAX, True: np.float32(256.0)}
"""The largest E4M3 scale of an NVFP4 block that the global scale aims at, without and with Four-Over-Six: the latter's
second candidate is 1.5 times the first, and 256 * 1.5 is within E4M3."""

E4M3_MIN = np.float32(2.0**-9)
"""The smallest positive (subnormal) E4M3 value."""

E5M2_MAX = np.float32(57344.0)
F32_MIN_NORMAL = np.finfo(np.float32).tiny
