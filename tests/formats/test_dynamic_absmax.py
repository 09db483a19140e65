"""Double quantization as bitsandbytes does it, step by step and against plain loops."""

import numpy as np
from formats.cases import weights
from hypothesis import given, settings

from surogate_formats.dynamic_absmax import (
    DYNAMIC_MAP,
    DYNAMIC_MIDPOINTS,
    mean_absmax,
    quantize_dynamic,
    restore_dynamic,
)
from surogate_formats.nf4 import NF4, block_absmax

F32 = np.float32


def loop(absmax):
    """Codes, nested absmax and offset, one value at a time."""
    total = np.float64(0)
    for value in absmax:
        total += np.float64(value)
    offset = F32(total / len(absmax))
    codes, nested = [], []
    for start in range(0, len(absmax), 256):
        centred = [F32(value - offset) for value in absmax[start : start + 256]]
        nested.append(max(abs(value) for value in centred))
        inverse = F32(1) / max(nested[-1], F32(1e-38))
        codes += [sum(bool(threshold < F32(value * inverse)) for threshold in DYNAMIC_MIDPOINTS) for value in centred]
    return codes, nested, offset


def test_the_map_is_ascending_with_both_signs_of_each_step_and_a_one_of_its_own():
    assert (np.diff(DYNAMIC_MAP) > 0).all()
    assert DYNAMIC_MAP[[127, 255]].tolist() == [0, 1]
    np.testing.assert_array_equal(DYNAMIC_MAP[:127], -DYNAMIC_MAP[254:127:-1])
    for decade, steps in enumerate((64, 32, 16, 8, 4, 2, 1)):
        magnitudes = DYNAMIC_MAP[128:255] * 10.0**decade
        inside = magnitudes[(magnitudes > 0.1) & (magnitudes < 1)]
        centres = 0.1 + (np.arange(steps) + 0.5) * 0.9 / steps
        np.testing.assert_allclose(inside, centres, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(weights())
def test_quantize_against_a_loop(weight):
    absmax = np.abs(weight.f32).reshape(-1)[:300]
    codes, nested, offset = loop(absmax)
    parts = quantize_dynamic(absmax)
    assert parts["absmax"].tolist() == codes
    assert parts["nested_absmax"].tolist() == nested
    assert parts["nested_offset"].tolist() == [offset]
    groups = np.arange(absmax.size) // 256
    values = [F32(F32(DYNAMIC_MAP[code] * nested[group]) + offset) for code, group in zip(codes, groups, strict=True)]
    assert restore_dynamic(parts).tolist() == values


def test_a_tie_takes_the_lower_code():
    thresholds = DYNAMIC_MIDPOINTS[130:254]
    codes = quantize_dynamic(np.concatenate([thresholds, -thresholds, [1, -1]]).astype(F32))["absmax"]
    assert codes[: thresholds.size].tolist() == list(range(130, 254))


def test_the_mean_is_of_all_blocks_and_a_group_has_256():
    absmax = np.concatenate([np.full(256, 1), np.full(256, 5), [3]]).astype(F32)
    parts = quantize_dynamic(absmax)
    assert parts["nested_offset"].tolist() == [3]
    assert parts["nested_absmax"].tolist() == [2, 2, 0]
    assert parts["absmax"][[255, 256, 512]].tolist() == [0, 255, 127]
    assert restore_dynamic(parts)[[256, 512]].tolist() == [5, 3]


def test_the_mean_is_summed_in_float64_one_after_the_other():
    absmax = np.array([1, 2.0**-30, 2.0**-30, 2.0**30], F32)
    assert mean_absmax(absmax) == F32((1 + 2.0**-29 + 2.0**30) / 4)
    assert mean_absmax(np.full(1 << 16, 0.1, F32)) == F32(0.1)
    assert mean_absmax(np.full(3, 3.4e38, F32)) == F32(3.4e38)
    assert mean_absmax(np.empty(0, F32)) == 0


@settings(max_examples=15, deadline=None)
@given(weights())
def test_codes_are_those_without_double_quantization(weight):
    """As in bitsandbytes: they are chosen before absmax is rounded."""
    x = weight.f32
    parts = NF4(64, "dynamic").quantize(x)
    assert parts["codes"].tobytes() == NF4(64, "none").quantize(x)["codes"].tobytes()


def test_beside_outliers_a_restored_absmax_is_negative_as_its_readers_have_it():
    absmax = np.full(256, 0.01, F32)
    absmax[:40] = 100
    restored = block_absmax(quantize_dynamic(absmax))
    assert (restored < 0).any()
