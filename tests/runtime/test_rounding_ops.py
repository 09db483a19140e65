"""What is quantized at run time: against numpy, against published vectors, and on average."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from runtime.opcheck import check_op
from runtime.weights import KINDS, make_weight

from surogate_formats.nvfp4 import NVFP4
from surogate_formats.tables import E2M1_VALUES
from surogate_load import ops  # noqa: F401
from surogate_load.ops.hadamard import SIGNS
from surogate_load.ops.philox import philox, uniform
from surogate_load.ops.rounding import (
    from_e2m1_codes,
    to_e2m1_codes,
    to_e2m1_codes_stochastic,
    to_e4m3_up,
)

QUANTIZE = torch.ops.surogate.quantize_nvfp4
STOCHASTIC = torch.ops.surogate.quantize_nvfp4_stochastic
FP8 = torch.ops.surogate.quantize_fp8


def words(*values):
    return tuple(torch.tensor([value], dtype=torch.int64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    found = philox(words(*counter), words(*key))
    assert tuple(int(word) for word in found) == expected


def test_uniform_takes_word_i_mod_4_of_counter_i_div_4():
    seed, offset = torch.tensor([-(2**63) + 5]), torch.tensor([2**40 + 3])
    found = uniform(10, seed, offset)
    key = words(5, 0x80000000)
    expected = []
    for block in range(3):
        expected += [int(word) for word in philox(words(block, 0, 3, 2**8), key)]
    assert found.tolist() == [(word >> 8) / 2**24 for word in expected[:10]]
    assert uniform(1000, seed, offset).max() < 1


def test_e2m1_rounds_ties_to_even_and_saturates():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0, -0.1, -5.0])
    assert from_e2m1_codes(to_e2m1_codes(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0, -4]
    assert int(to_e2m1_codes(torch.tensor([-0.0]))[0]) == 8
    values = torch.from_numpy(E2M1_VALUES)
    assert torch.equal(to_e2m1_codes(values), torch.arange(16, dtype=torch.uint8))


def test_e4m3_up_is_the_smallest_value_not_below():
    grid = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    x = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, np.nextafter(grid[:-1], np.float32(1e9))])
    expected = grid[np.searchsorted(grid, x)]
    np.testing.assert_array_equal(to_e4m3_up(torch.from_numpy(x)).float().numpy(), expected)
    assert to_e4m3_up(torch.tensor([1e9])).float().tolist() == [448]


@pytest.mark.parametrize("x", [0.0, 0.1, 0.5, 0.7, 1.2, 2.25, 3.3, 4.5, 5.2, 6.0, 8.0])
def test_stochastic_rounding_goes_up_with_the_probability_of_the_position(x):
    steps = (torch.arange(4096) + 0.5) / 4096
    for sign in (1, -1):
        values = from_e2m1_codes(to_e2m1_codes_stochastic(torch.full((4096,), sign * x), steps))
        assert values.mean().item() == pytest.approx(sign * min(x, 6.0), abs=2 / 4096)
        assert len(values.unique()) <= 2


FORMATS = [
    NVFP4(two_d, four_over_six, metric, rule)
    for two_d, four_over_six, metric, rule in itertools.product(
        (False, True), (False, True), ("mse", "l1", "absmax"), ("pow2", "amax")
    )
    if four_over_six or metric == "mse"
]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: "-".join(map(str, vars(fmt).values())))
@pytest.mark.parametrize("kind", KINDS)
def test_nvfp4_equals_numpy(fmt, kind):
    for shape in ((21, 48), (1, 16), (32, 64)):
        weight = make_weight(kind, shape)
        with np.errstate(all="ignore"):
            expected = fmt.quantize(weight)
        found = QUANTIZE(torch.from_numpy(weight), fmt.two_d, fmt.four_over_six, fmt.metric, fmt.global_scale == "pow2")
        for part, tensor in zip(("codes", "scale", "global_scale"), found, strict=True):
            np.testing.assert_array_equal(tensor.view(torch.uint8).numpy(), expected[part].view(np.uint8), err_msg=part)


def test_nvfp4_of_half_precision_is_that_of_its_float32():
    x = torch.randn(8, 32)
    for dtype in (torch.bfloat16, torch.float16):
        for narrow, wide in zip(
            QUANTIZE(x.to(dtype), False, True, "mse", False),
            QUANTIZE(x.to(dtype).float(), False, True, "mse", False),
            strict=True,
        ):
            assert torch.equal(narrow.view(torch.uint8), wide.view(torch.uint8))


def mean_of_draws(x, draws):
    seed, offset = torch.tensor([7]), torch.zeros(1, dtype=torch.int64)
    total = torch.zeros_like(x, dtype=torch.float64)
    for _ in range(draws):
        total += torch.ops.surogate.dequantize_nvfp4(*STOCHASTIC(x, seed, offset), torch.float32, None)
    assert offset.item() == draws
    return total / draws


def test_stochastic_nvfp4_is_unbiased():
    x = torch.from_numpy(make_weight("outlier", (8, 64)))
    draws = 600
    mean = mean_of_draws(x, draws)
    _, scale, g = STOCHASTIC(x, torch.tensor([7]), torch.zeros(1, dtype=torch.int64))
    step = (scale.float() / g).repeat_interleave(16, dim=1)
    # one draw lies in an interval of at most 2 steps, so its deviation is at most 1 step
    error = (mean - x).abs() / step
    assert error.max() < 5 / draws**0.5
    assert ((mean - x) / step).mean().abs() < 5 / (draws * x.numel()) ** 0.5


def test_stochastic_nvfp4_of_exact_values_is_exact():
    x = from_e2m1_codes(torch.arange(16, dtype=torch.uint8)).repeat(4, 1) * 448
    seed, offset = torch.tensor([1]), torch.zeros(1, dtype=torch.int64)
    for _ in range(8):
        dense = torch.ops.surogate.dequantize_nvfp4(*STOCHASTIC(x, seed, offset), torch.float32, None)
        assert torch.equal(dense, x)


def test_stochastic_noise_depends_on_seed_offset_and_index():
    x = torch.full((4, 64), 0.3)
    x[:, 0] = 1.0

    def codes(seed, offset):
        return STOCHASTIC(x, torch.tensor([seed]), torch.tensor([offset]))[0]

    assert torch.equal(codes(1, 0), codes(1, 0))
    assert not torch.equal(codes(1, 0), codes(2, 0))
    assert not torch.equal(codes(1, 0), codes(1, 1))
    assert not torch.equal(codes(1, 0)[0], codes(1, 0)[1])


def test_hadamard_is_the_signed_sylvester_matrix_over_four():
    h = torch.ones(1, 1)
    for _ in range(4):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    matrix = torch.diag(torch.tensor(SIGNS, dtype=torch.float32)) @ h / 4
    x = torch.randn(6, 48)
    expected = (x.reshape(-1, 16) @ matrix).reshape(6, 48)
    torch.testing.assert_close(torch.ops.surogate.hadamard16(x), expected)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_with_a_scale_saturates_and_rounds_to_nearest(dtype):
    numpy_dtype = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2}[dtype]
    limit = {torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}[dtype]
    x = torch.from_numpy(make_weight("outlier", (20, 30))) * 30
    scale, current = torch.tensor([40.0]), torch.tensor([3.0])
    codes, decode = FP8(x, None, scale, current, True, 0, dtype)
    expected = np.clip(x.numpy() * np.float32(40), -limit, limit).astype(numpy_dtype)
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy(), expected.view(np.uint8))
    assert decode.item() == np.float32(1) / np.float32(40)
    assert current.item() == max(3, x.abs().max().item())
    if dtype == torch.float8_e4m3fn:
        assert expected.astype(np.float32).max() == 448


def test_fp8_without_a_scale_yet_takes_its_own_amax():
    x = torch.tensor([[0.5, -2.0, 1.0]])
    current = torch.zeros(1)
    codes, decode = FP8(x, None, torch.zeros(1), current, False, 1, torch.float8_e4m3fn)
    assert current.item() == 0
    assert decode.item() == pytest.approx(2 / 224)
    assert codes.float().tolist() == [[56, -224, 112]]


def test_fp8_scale_stays_within_the_normal_range():
    for amax, decode in ((1e-40, 2.0**-126), (0.0, 1.0), (float("inf"), 1.0)):
        x = torch.tensor([amax, 0.0])
        codes, found = FP8(x, None, torch.zeros(1), torch.zeros(1), False, 0, torch.float8_e5m2)
        assert found.item() == decode
        assert codes.float().isfinite().all()


def test_fp8_column_scale_is_part_of_what_is_quantized():
    x, columns = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16), torch.tensor([3.0, 0.5])
    current = torch.zeros(1)
    codes, _ = FP8(x, columns, torch.tensor([2.0]), current, True, 0, torch.float8_e5m2)
    assert codes.float().tolist() == [[6, 1]]
    assert current.item() == 3


def test_opcheck():
    x = torch.randn(5, 32)
    check_op(QUANTIZE.default, (x, True, True, "l1", True))
    check_op(QUANTIZE.default, (x.bfloat16(), False, False, "mse", False))
    check_op(STOCHASTIC.default, (x, torch.tensor([3]), torch.tensor([4])))
    check_op(torch.ops.surogate.hadamard16.default, (x,))
    for columns in (None, torch.rand(32)):
        arguments = (x, columns, torch.zeros(1), torch.zeros(1), True, 0, torch.float8_e4m3fn, 3)
        check_op(FP8.default, arguments)
