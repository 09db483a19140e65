"""The dequantize ops: bit-equal to numpy, checked by torch's own op checker, and split into forward and backward."""

import ml_dtypes
import numpy as np
import pytest
import torch
from runtime.opcheck import check_op
from runtime.weights import FORMATS, KINDS, make_weight, name_of

from surogate_load.ops import dequantize
from surogate_load.weight import WeightKind, to_torch

NUMPY = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}


def quantized(fmt, weight):
    with np.errstate(all="ignore"):
        parts = fmt.quantize(weight)
    kind = WeightKind(fmt, weight.shape)
    return parts, kind, [to_torch(parts[name]) for name in kind.specs]


def bits(array):
    return array.view({4: np.uint32, 2: np.uint16, 1: np.uint8}[array.itemsize])


def torch_bits(tensor):
    return tensor.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()]).numpy()


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_numpy_bit_for_bit(fmt, kind):
    shapes = [(19, 48), (1, 16)]
    if fmt.name != "fp4":
        shapes += [(7, 13), (3, 1), (1, 1)]
    if kind == "outlier":
        shapes += [(130, 144)] if fmt.name == "fp4" else [(129, 131)]
    for shape in shapes:
        parts, weight_kind, tensors = quantized(fmt, make_weight(kind, shape))
        with np.errstate(all="ignore"):
            dense = fmt.dequantize(parts, shape)
            for dtype, numpy_dtype in NUMPY.items():
                expected = bits(dense.astype(numpy_dtype))
                found = weight_kind.dequantize(tensors, dtype)
                assert found.dtype == dtype
                np.testing.assert_array_equal(torch_bits(found).view(expected.dtype), expected)
                backward = weight_kind.dequantize_for_backward(torch.zeros(2), tensors, dtype)
                np.testing.assert_array_equal(torch_bits(backward).view(expected.dtype), expected)


@pytest.mark.parametrize("fmt", [*FORMATS[1:3], FORMATS[6], FORMATS[-3], FORMATS[-2]], ids=name_of)
def test_pieces_join_without_a_seam(fmt, monkeypatch):
    shape = (300, 272)
    parts, kind, tensors = quantized(fmt, make_weight("outlier", shape))
    whole = kind.dequantize(tensors, torch.bfloat16)
    monkeypatch.setattr(dequantize, "PIECE", 1024)
    assert torch.equal(kind.dequantize(tensors, torch.bfloat16), whole)
    np.testing.assert_array_equal(kind.dequantize(tensors, torch.float32).numpy(), fmt.dequantize(parts, shape))


@pytest.mark.parametrize("fmt", [*FORMATS[:3], FORMATS[6], FORMATS[-7], FORMATS[-1]], ids=name_of)
def test_multiplier_and_e4m3(fmt):
    parts, kind, tensors = quantized(fmt, make_weight("random", (32, 48)))
    multiplier = torch.tensor([256.0])
    scaled = fmt.dequantize(parts, (32, 48)) * np.float32(256)
    found = kind.dequantize(tensors, torch.float8_e4m3fn, multiplier)
    expected = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(torch_bits(found), expected.view(np.uint8))
    np.testing.assert_array_equal(kind.dequantize(tensors, torch.float32, multiplier).numpy(), scaled)


@pytest.mark.parametrize("fmt", [*FORMATS[:3], FORMATS[6], *FORMATS[-7:-5], *FORMATS[-4::2]], ids=name_of)
def test_opcheck(fmt):
    _, _, tensors = quantized(fmt, make_weight("random", (32, 48)))
    op, extra = {
        "nf4": lambda: ("dequantize_nf4", (*(None,) * (4 - len(tensors)), 32, 48, fmt.block_size, fmt.double_quant)),
        "fp4": lambda: ("dequantize_nvfp4" + ("_multiplied" if fmt.step == "multiply" else ""), ()),
        "fp8": lambda: ("dequantize_fp8", (fmt.scaling,)),
    }[fmt.name]()
    arguments = (*tensors, *extra, torch.bfloat16, None)
    check_op(getattr(torch.ops.surogate, op).default, arguments)
    check_op(getattr(torch.ops.surogate, f"{op}_for_backward").default, (torch.ones(3, 4), *arguments))
