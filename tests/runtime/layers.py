"""Single quantized layers for tests."""

import numpy as np
import torch
from runtime.weights import make_weight

from surogate_formats.fp8 import FP8
from surogate_formats.layouts import settle
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_load.linear import QuantizedLinear
from surogate_load.model_recipe import set_recipe
from surogate_load.weight import to_torch

KINDS = {
    "nf4": NF4(),
    "nf4-none": NF4(double_quant="none"),
    "nf4-dynamic": NF4(double_quant="dynamic"),
    "fp4": NVFP4(),
    "fp4-1d": NVFP4(two_d=False),
    "fp8-tensor": FP8("tensor", "bfloat16"),
    "fp8-channel": FP8("channel", "bfloat16"),
    "fp8-block": FP8("block"),
    "fp4-modelopt": NVFP4(step="multiply"),
    "fp8-modelopt": FP8("tensor"),
}
"""One layer of each kind that an artifact can hold."""


def make_layer(kind, shape=(48, 32), *, bias=True, dtype=torch.float32, seed=0):
    """A layer, and its dense weight in float32 as numpy dequantizes it."""
    fmt, layout = settle(KINDS[kind].name, vars(KINDS[kind]))
    weight = make_weight("random", shape, seed) * np.float32(0.1)
    parts = fmt.quantize(weight)
    vector = torch.from_numpy(make_weight("random", (shape[0],), seed + 1)) if bias else None
    layer = QuantizedLinear.from_parts(
        fmt, layout, {name: to_torch(array) for name, array in parts.items()}, shape, bias=vector, compute_dtype=dtype
    )
    return layer, torch.from_numpy(fmt.dequantize(parts, shape))


def with_recipe(layer, recipe):
    """The layer under a recipe, in training mode, as a model of its own."""
    model = torch.nn.Sequential(layer)
    set_recipe(model, recipe, emulate=True)
    return model.train()
