"""Every format with every combination of its parameters, and weights that look for trouble."""

from dataclasses import dataclass
from itertools import product

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from surogate_formats.dtypes import NUMPY
from surogate_formats.fp8 import FP8
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_formats.tables import NF4_MIDPOINTS

NF4_FORMATS = [NF4(block, double) for block, double in product((64, 128), ("affine", "dynamic", "none"))]
NVFP4_FORMATS = [
    NVFP4(two_d, four_over_six, metric, rule)
    for two_d, four_over_six, metric, rule in product(
        (True, False), (True, False), ("mse", "l1", "absmax"), ("pow2", "amax")
    )
    if four_over_six or metric == "mse"
]
FP8_FORMATS = [
    FP8(scaling, dtype) for scaling, dtype in product(("tensor", "channel", "block"), ("float32", "bfloat16"))
]
MULTIPLYING_FORMATS = [NVFP4(step="multiply"), NVFP4(two_d=False, four_over_six=False, step="multiply")]
FORMATS = [*NF4_FORMATS, *NVFP4_FORMATS, *FP8_FORMATS, *MULTIPLYING_FORMATS]

SHAPES = [(1, 1), (3, 17), (129, 130), (1, 16), (17, 48), (16, 64), (2, 32), (5, 127), (33, 144), (260, 64), (7, 1040)]
"""Sides of 1, primes, just over a tile, partial blocks; a third have K % 16 == 0."""

SOURCE_DTYPES = ("BF16", "F16", "F32")

E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def name_of(fmt):
    """A format's id in a test's name; None, pytest's own id, for anything else."""
    if not hasattr(fmt, "part_specs"):
        return None
    return "-".join([fmt.name, *(str(value) for value in vars(fmt).values())])


def fitting(fmt, shape):
    """The shape with K cut or raised to what the format takes."""
    return shape if fmt.keep_reason(shape) is None else (shape[0], max(shape[1] // 16, 1) * 16)


@dataclass(frozen=True)
class Weight:
    """A finite weight in a source's dtype, and as float32."""

    stored: np.ndarray
    dtype: str

    @property
    def f32(self):
        return self.stored.astype(np.float32)

    @property
    def limit(self):
        return float(ml_dtypes.finfo(NUMPY[self.dtype]).max)

    def fit(self, fmt):
        """The same weight with columns cut off, or repeated, to what the format takes."""
        rows, columns = fitting(fmt, self.stored.shape)
        tiled = np.tile(self.stored, (1, -(-columns // self.stored.shape[1])))
        return Weight(np.ascontiguousarray(tiled[:rows, :columns]), self.dtype)


def _normal(rng, shape):
    return rng.standard_normal(shape) * 0.03


def _outliers(rng, shape):
    weight = _normal(rng, shape)
    weight[rng.random(shape) < 0.01] *= 1000
    return weight


def _zero_blocks(rng, shape):
    """Runs of zeros of both signs, long enough to empty whole blocks, and single zeros."""
    weight = _normal(rng, shape).reshape(-1)
    for start in rng.integers(0, weight.size, 3):
        weight[start : start + 150] = rng.choice([0.0, -0.0])
    return weight.reshape(shape)


def _zero(rng, shape):
    return np.zeros(shape)


def _subnormal(rng, shape):
    return rng.standard_normal(shape) * 10.0 ** -rng.integers(37, 46)


def _every_magnitude(rng, shape):
    return rng.standard_normal(shape) * 2.0 ** rng.integers(-40, 12, shape)


def _huge(rng, shape):
    return rng.uniform(-1, 1, shape) * 3.4e38


def _e2m1_ties(rng, shape):
    """Every block's amax is 6 (or 4) times a power of two, all else on ties of E2M1."""
    weight = rng.choice([*E2M1_TIES, 0.0, 1.0, 3.0], shape) * rng.choice([1, -1], shape)
    weight[:, ::16] = rng.choice([6.0, 4.0])
    return weight * 2.0 ** rng.integers(-12, 3)


def _e4m3_ties(rng, shape):
    """Halfway between E4M3 neighbours, normal and subnormal; a 448 in every row and tile."""
    codes = np.arange(126, dtype=np.uint8)
    low, high = (c.view(ml_dtypes.float8_e4m3fn).astype(np.float64) for c in (codes, codes + np.uint8(1)))
    weight = rng.choice((low + high) / 2, shape) * rng.choice([1, -1], shape)
    weight[:, ::128] = 448
    return weight * 2.0 ** rng.integers(-12, 3)


def _nf4_ties(rng, shape):
    """Every block's absmax is a power of two, all else on NF4's thresholds."""
    weight = rng.choice(np.concatenate([NF4_MIDPOINTS, [0, -1]]), size=shape).reshape(-1)
    weight[::64] = -1
    return weight.reshape(shape) * 2.0 ** rng.integers(-12, 3)


KINDS = (
    _normal, _outliers, _zero_blocks, _zero, _subnormal, _every_magnitude, _huge, _e2m1_ties, _e4m3_ties, _nf4_ties,
)  # fmt: skip


def _finite(weight, dtype):
    limit = float(ml_dtypes.finfo(NUMPY[dtype]).max)
    return np.clip(weight, -limit, limit).astype(NUMPY[dtype])


@st.composite
def seeded_weights(draw):
    """Large weights of one kind; all from a seed, so that drawing is cheap."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = draw(st.sampled_from(KINDS))(rng, draw(st.sampled_from(SHAPES)))
    dtype = draw(st.sampled_from(SOURCE_DTYPES))
    return Weight(_finite(weight, dtype), dtype)


@st.composite
def drawn_weights(draw):
    """Small weights whose every value hypothesis draws (and shrinks)."""
    shape = draw(st.tuples(st.integers(1, 18), st.sampled_from([1, 2, 5, 16, 32, 70])))
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    dtype = draw(st.sampled_from(SOURCE_DTYPES))
    return Weight(_finite(draw(npst.arrays(np.float32, shape, elements=values, fill=values)), dtype), dtype)


def weights():
    return st.one_of(seeded_weights(), seeded_weights(), drawn_weights())
