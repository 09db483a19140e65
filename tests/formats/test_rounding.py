"""Rounding at every tie, on both sides of it, and against the casts of torch."""

import ml_dtypes
import numpy as np
import pytest
import torch
from formats.test_tables import e4m3_literal
from hypothesis import given
from hypothesis import strategies as st

from surogate_formats.rounding import (
    bfloat16_up,
    from_e2m1_codes,
    pack_nibbles,
    to_e2m1_codes,
    to_e4m3,
    unpack_nibbles,
)

E2M1_TIES = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}
"""Value to code: the neighbour with the even mantissa bit."""

UP, DOWN = np.float32(np.inf), np.float32(0)


def f32(*values):
    return np.array(values, np.float32)


@pytest.mark.parametrize(("tie", "code"), E2M1_TIES.items())
def test_e2m1_ties_go_to_the_even_code_and_their_neighbours_to_the_nearest(tie, code):
    below = {0.25: 0, 0.75: 1, 1.25: 2, 1.75: 3, 2.5: 4, 3.5: 5, 5.0: 6}[tie]
    near = f32(np.nextafter(f32(tie), DOWN)[0], tie, np.nextafter(f32(tie), UP)[0])
    assert to_e2m1_codes(near).tolist() == [below, code, below + 1]
    assert to_e2m1_codes(-near).tolist() == [8 | below, 8 | code, 8 | (below + 1)]


def test_e2m1_keeps_the_sign_of_zero_and_saturates():
    subnormal, largest = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    values = f32(0.0, -0.0, subnormal, -subnormal, 6, 6.5, largest, np.inf, -np.inf)
    assert to_e2m1_codes(values).tolist() == [0, 8, 0, 8, 7, 7, 7, 7, 15]
    assert np.signbit(from_e2m1_codes(to_e2m1_codes(values)))[[1, 3]].all()


def test_e2m1_codes_round_trip():
    codes = np.arange(16, dtype=np.uint8)
    assert to_e2m1_codes(from_e2m1_codes(codes)).tolist() == codes.tolist()


def test_e4m3_is_torchs_cast_for_every_bfloat16_and_half_in_range():
    every = np.arange(2**16, dtype=np.uint16)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        values = every.view(dtype).astype(np.float32)
        values = values[np.isfinite(values) & (np.abs(values) <= 448)]
        expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        assert values.size > 2**15
        np.testing.assert_array_equal(to_e4m3(values).view(np.uint8), expected)


def test_e4m3_ties_and_their_neighbours_against_the_literal_table():
    positive = e4m3_literal()[:127]
    low = np.arange(126)
    tie = (positive[:-1] + positive[1:]) / np.float32(2)
    even = np.where(low % 2 == 0, low, low + 1)
    assert to_e4m3(tie).view(np.uint8).tolist() == even.tolist()
    assert to_e4m3(-tie).view(np.uint8).tolist() == (even | 128).tolist()
    assert to_e4m3(np.nextafter(tie, DOWN)).view(np.uint8).tolist() == low.tolist()
    assert to_e4m3(np.nextafter(tie, UP)).view(np.uint8).tolist() == (low + 1).tolist()


def test_e4m3_saturates():
    values = f32(448, 463.99997, 464, 465, 1e30, np.inf)
    assert to_e4m3(values).view(np.uint8).tolist() == [0x7E] * 6
    assert to_e4m3(-values).view(np.uint8).tolist() == [0xFE] * 6


@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-448, max_value=448), min_size=1))
def test_e4m3_is_torchs_cast(values):
    array = f32(*values)
    expected = torch.from_numpy(array).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(to_e4m3(array).view(np.uint8), expected)


@given(st.floats(width=32, min_value=0, max_value=2.0**127))
def test_bfloat16_up_is_the_smallest_bfloat16_that_is_not_smaller(value):
    (rounded,) = bfloat16_up(f32(value))
    assert rounded >= np.float32(value)
    assert rounded.astype(ml_dtypes.bfloat16).astype(np.float32) == rounded
    below = (f32(rounded).view(np.uint32) - np.uint32(1 << 16)).view(np.float32)[0]
    assert rounded == 0 or below < np.float32(value)


def test_nibble_order():
    codes = np.array([[1, 2, 3]], np.uint8)
    assert pack_nibbles(codes, first_high=True, pad=7).tolist() == [[0x12, 0x37]]
    assert pack_nibbles(codes, first_high=False, pad=7).tolist() == [[0x21, 0x73]]


@given(st.lists(st.integers(0, 15), min_size=1, max_size=33), st.booleans())
def test_nibbles_round_trip(codes, first_high):
    array = np.array(codes, np.uint8)
    packed = pack_nibbles(array, first_high=first_high)
    assert packed.size == -(-len(codes) // 2)
    assert unpack_nibbles(packed, len(codes), first_high=first_high).tolist() == codes
