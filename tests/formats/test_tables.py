"""The value tables against literals written out by hand: nothing here is computed by what it checks."""

import ml_dtypes
import numpy as np
import pytest
import torch

from surogate_formats import tables
from surogate_formats.dtypes import BITS, NAMES, NUMPY
from surogate_formats.fp8 import FP8
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4

NF4_VALUES = """
bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000
3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000
"""
"""float32 bits, code 0 to 15."""

NF4_THRESHOLDS = """
bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871
3d22faff 3df64862 3e5067e0 3e9582d4 3ec753f9 3f006d04 3f248daf 3f5c89da
"""
"""float32 bits of the 15 decision thresholds: the midpoints of neighbours, rounded to nearest even."""

E2M1_FIELDS = [(sign, exponent, mantissa) for sign in (0, 1) for exponent in range(4) for mantissa in (0, 1)]
"""Sign, exponent (bias 1) and mantissa of code 0 to 15 (OCP Microscaling Formats v1.0, table 4)."""

E2M1_LITERAL = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]

E4M3_POSITIVE = {
    0: "0 1 2 3 4 5 6 7",
    1: "8 9 10 11 12 13 14 15",
    2: "16 18 20 22 24 26 28 30",
    3: "32 36 40 44 48 52 56 60",
    4: "64 72 80 88 96 104 112 120",
    5: "128 144 160 176 192 208 224 240",
    6: "256 288 320 352 384 416 448 480",
    7: "512 576 640 704 768 832 896 960",
    8: "1024 1152 1280 1408 1536 1664 1792 1920",
    9: "2048 2304 2560 2816 3072 3328 3584 3840",
    10: "4096 4608 5120 5632 6144 6656 7168 7680",
    11: "8192 9216 10240 11264 12288 13312 14336 15360",
    12: "16384 18432 20480 22528 24576 26624 28672 30720",
    13: "32768 36864 40960 45056 49152 53248 57344 61440",
    14: "65536 73728 81920 90112 98304 106496 114688 122880",
    15: "131072 147456 163840 180224 196608 212992 229376 nan",
}
"""E4M3fn by exponent field, mantissa 0 to 7, in units of the smallest subnormal, 2^-9 (OCP OFP8 v1.0, section 5)."""


def bits(array):
    return array.view(np.uint32).tolist()


def hexadecimal(text):
    return [int(word, 16) for word in text.split()]


def e4m3_literal():
    positive = [float(unit) / 512 for row in E4M3_POSITIVE.values() for unit in row.split()]
    return np.array([*positive, *(-value for value in positive)], np.float32)


def test_nf4_codebook_and_thresholds():
    assert bits(tables.NF4_CODEBOOK) == hexadecimal(NF4_VALUES)
    assert bits(tables.NF4_MIDPOINTS) == hexadecimal(NF4_THRESHOLDS)
    assert tables.NF4_CODEBOOK[tables.NF4_ZERO_CODE] == 0


def test_e2m1_values():
    assert bits(tables.E2M1_VALUES) == bits(np.array(E2M1_LITERAL, np.float32))
    for value, (sign, exponent, mantissa) in zip(tables.E2M1_VALUES, E2M1_FIELDS, strict=True):
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert abs(value) == magnitude
        assert np.signbit(value) == bool(sign)


def test_every_e4m3_code():
    codes = np.arange(256, dtype=np.uint8)
    literal = e4m3_literal()
    for decoded in (
        codes.view(NUMPY["F8_E4M3"]).astype(np.float32),
        torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy(),
    ):
        nan = np.isnan(literal)
        assert np.flatnonzero(nan).tolist() == [0x7F, 0xFF] == np.flatnonzero(np.isnan(decoded)).tolist()
        assert bits(decoded[~nan]) == bits(literal[~nan])


def test_limits():
    assert tables.E4M3_MAX == 448 == np.nanmax(e4m3_literal())
    assert tables.E4M3_MIN == 2.0**-9
    assert tables.E2M1_MAX == 6
    assert tables.E5M2_MAX == 57344 == float(torch.finfo(torch.float8_e5m2).max)
    assert bits(np.array([tables.F32_MIN_NORMAL], np.float32)) == [0x00800000]


def test_all_codes_of_every_format_dequantize_to_their_table():
    low_first = np.array([code | ((code + 1) % 16) << 4 for code in range(0, 16, 2)], np.uint8)[None, :]
    high_first = np.array([code << 4 | (code + 1) for code in range(0, 16, 2)], np.uint8)[None, :]
    one = np.ones(1, np.float32)
    nf4 = NF4(double_quant="none").dequantize({"codes": high_first, "absmax": one}, (1, 16))
    assert bits(nf4[0]) == hexadecimal(NF4_VALUES)
    scale = np.ones((1, 1), ml_dtypes.float8_e4m3fn)
    fp4 = NVFP4().dequantize({"codes": low_first, "scale": scale, "global_scale": one}, (1, 16))
    assert bits(fp4[0]) == bits(np.array(E2M1_LITERAL, np.float32))
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128).view(ml_dtypes.float8_e4m3fn)
    fp8 = FP8().dequantize({"codes": codes, "scale": one}, (2, 128)).reshape(-1)
    np.testing.assert_array_equal(fp8, e4m3_literal())


@pytest.mark.parametrize("name", sorted(BITS))
def test_dtypes_agree_with_safetensors_and_numpy(name):
    if name in NUMPY:
        assert NUMPY[name].itemsize * 8 == BITS[name]
        assert NAMES[NUMPY[name]] == name
    else:
        assert name in {"F4", "F6_E2M3", "F6_E3M2"}
        assert BITS[name] == int(name[1])
