"""Weights and formats that the runtime's tests share."""

from itertools import product

import numpy as np

from surogate_formats.fp8 import FP8
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4

FORMATS = [
    *(NF4(block, double) for block, double in product((64, 128), ("none", "affine", "dynamic"))),
    *(
        NVFP4(two_d, four_over_six, metric, rule)
        for two_d, four_over_six, metric, rule in product(
            (False, True), (False, True), ("mse", "l1", "absmax"), ("pow2", "amax")
        )
        if four_over_six or metric == "mse"
    ),
    *(NVFP4(False, False, "mse", rule, "multiply") for rule in ("pow2", "amax")),
    *(FP8(scaling, dtype) for scaling, dtype in product(("tensor", "channel", "block"), ("float32", "bfloat16"))),
]


def make_weight(kind, shape, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(np.float32)
    if kind == "outlier":
        weight[rng.random(shape) < 0.002] *= 3000
    if kind == "zero":
        weight[:] = 0
    if kind == "zero blocks":
        weight[: shape[0] // 2] = 0
        weight[0, 0] = -0.0
    if kind == "subnormal":
        weight *= np.float32(1e-41)
    if kind == "tiny":
        weight *= np.float32(3e-38)
    if kind == "huge":
        weight *= np.float32(1e37)
    return weight


KINDS = ("random", "outlier", "zero", "zero blocks", "subnormal", "tiny", "huge")


def name_of(fmt):
    return "-".join([fmt.name, *(str(value) for value in vars(fmt).values())])
