"""The CUDA engine on a GPU: every byte and every sum of errors as the CPU engine has them, or else as numpy has.

numba may be missing on a machine with a GPU: weights are small enough then for the numpy definitions, and their errors
are held against float64.
"""

from importlib.util import find_spec

import ml_dtypes
import numpy as np
import pytest
from formats import cases
from formats.cases import FORMATS, KINDS, SHAPES, SOURCE_DTYPES, Weight, fitting, name_of
from quantizer.checkpoints import contents, llama, write_checkpoint

from surogate_formats.dtypes import NUMPY
from surogate_formats.errors import NonFiniteWeightError, OutOfRangeError
from surogate_formats.fp8 import FP8
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_quantize.cuda.engine import CudaEngine
from surogate_quantize.cuda.formats import QUANTIZERS
from surogate_quantize.cuda.job import VALUES_PER_TOTAL
from surogate_quantize.devices import open_engine
from surogate_quantize.engine import CpuEngine
from surogate_quantize.source import Source

pytestmark = pytest.mark.gpu

NUMBA = find_spec("numba") is not None
F32 = np.float32
LARGER = [*SHAPES, (1, 65552), (300, 272), (257, 1008), (64, 4096), (4097, 112)]
ONE_OF_EACH = [NF4(), NF4(128, "none"), NVFP4(), NVFP4(False), FP8(), FP8("channel"), FP8("block")]


@pytest.fixture(scope="module")
def gpu():
    with CudaEngine(NF4()) as engine:
        yield engine


@pytest.fixture(scope="module")
def cpu():
    with CpuEngine() as engine:
        yield engine


def no_fallback(engine, monkeypatch):
    """Lets nothing fall to the CPU, or the test would compare it with itself."""
    monkeypatch.setattr(engine, "_cpu", None)


def run(engine, fmt, weight, factor=None, search=False):
    source = Source.of(weight.stored, weight.dtype)
    amax = engine.amax(source)
    assert amax == np.abs(weight.f32).max()
    return engine.quantize(fmt, source, amax, None if factor is None else F32(amax * F32(factor)), search=search)


def expected_of(cpu, fmt, weight, factor, search):
    if NUMBA:
        return run(cpu, fmt, weight, factor, search)
    largest = np.abs(weight.f32).max()
    amax = None if factor is None else F32(largest * F32(factor))
    with np.errstate(all="ignore"):
        parts = fmt.quantize(weight.f32, amax, search=search and float(largest) < weight.limit / 2)
        values = fmt.dequantize(parts, weight.stored.shape)
        if not np.isfinite(values.astype(NUMPY[weight.dtype])).all():
            raise OutOfRangeError
    return parts, values


def assert_same(found, expected, weight):
    (parts, errors), (expected_parts, expected_errors) = found, expected
    assert parts.keys() == expected_parts.keys()
    for part, array in expected_parts.items():
        assert (parts[part].dtype, parts[part].shape) == (array.dtype, array.shape), part
        assert parts[part].tobytes() == array.tobytes(), part
    if NUMBA:
        assert errors == expected_errors
        return
    missed = expected_errors - weight.f32
    assert errors.max_error == np.abs(missed).max()
    largest = float(np.abs(weight.f32).max())
    if largest > 1e-30:
        for total, values in ((errors.squared_error, missed), (errors.squared_sum, weight.f32)):
            exact = values.astype(np.float64) / largest
            slack = np.abs(exact).sum() * 2.0**-20 + exact.size * 2.0**-42
            assert abs(total / largest**2 - (exact**2).sum()) <= slack


def compare(gpu, cpu, fmt, weight, factor=None, search=False):
    try:
        expected = expected_of(cpu, fmt, weight, factor, search)
    except OutOfRangeError:
        with pytest.raises(OutOfRangeError, match=f"dequantizes to no finite {weight.dtype} value"):
            run(gpu, fmt, weight, factor, search)
        return
    assert_same(run(gpu, fmt, weight, factor, search), expected, weight)


KNOWN = [fmt for fmt in FORMATS if QUANTIZERS[fmt.name].knows(fmt)]


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("fmt", KNOWN, ids=name_of)
@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
def test_every_kind_of_value_in_every_shape(gpu, cpu, fmt, dtype, search, monkeypatch):
    no_fallback(gpu, monkeypatch)
    rng = np.random.default_rng(0)
    for number, kind in enumerate(KINDS):
        for shape in {LARGER[(number + step) % len(LARGER)] for step in range(0, len(LARGER), 5)}:
            stored = cases._finite(kind(rng, fitting(fmt, shape)), dtype)
            compare(gpu, cpu, fmt, Weight(stored, dtype), search=search)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.shares_amax], ids=name_of)
@pytest.mark.parametrize("factor", [1, 1.7, 60])
def test_the_amax_of_a_fused_group(gpu, cpu, fmt, factor, search, monkeypatch):
    no_fallback(gpu, monkeypatch)
    stored = (np.random.default_rng(0).standard_normal((33, 144)) * 0.1).astype(ml_dtypes.bfloat16)
    compare(gpu, cpu, fmt, Weight(stored, "BF16"), factor, search)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("fmt", ONE_OF_EACH, ids=name_of)
@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
def test_one_outlier(gpu, cpu, fmt, dtype, search, monkeypatch):
    no_fallback(gpu, monkeypatch)
    stored = (np.random.default_rng(1).standard_normal((130, 1008)) * 0.02).astype(NUMPY[dtype])
    stored[77, 501] = -60000
    stored[:, :16] = [0.0, -0.0] * 8
    compare(gpu, cpu, fmt, Weight(stored, dtype), search=search)


@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
def test_every_bit_pattern_of_a_source(gpu, cpu, dtype, monkeypatch):
    """One value a row: its scale is |x| / 448 (or the floor), so nothing of x is lost to the test."""
    no_fallback(gpu, monkeypatch)
    words = np.arange(2**16, dtype=np.uint16) if dtype != "F32" else np.arange(0, 2**32, 65521, dtype=np.uint32)
    stored = words.view(NUMPY[dtype])
    with np.errstate(invalid="ignore"):
        magnitude = np.abs(stored.astype(F32))
    stored = stored[np.isfinite(magnitude) & (magnitude < float(ml_dtypes.finfo(NUMPY[dtype]).max) / 4)]
    compare(gpu, cpu, FP8("channel"), Weight(np.ascontiguousarray(stored[:, None]), dtype))


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("fmt", ONE_OF_EACH, ids=name_of)
def test_a_large_weight(gpu, cpu, fmt, search, monkeypatch):
    """More than 2^20 values, so that sums are made of several; with numba alone, since numpy needs minutes."""
    pytest.importorskip("numba")
    no_fallback(gpu, monkeypatch)
    rng = np.random.default_rng(0)
    stored = (rng.standard_normal((5120, 8000), np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    assert stored.size > 2 * VALUES_PER_TOTAL
    compare(gpu, cpu, fmt, Weight(stored, "BF16"), search=search)


@pytest.mark.parametrize("fmt", ONE_OF_EACH, ids=name_of)
def test_a_constant_weight_does_not_overflow_its_sums(gpu, fmt, monkeypatch):
    no_fallback(gpu, monkeypatch)
    stored = np.full((4096, 4096), 1 - 2.0**-8, ml_dtypes.bfloat16)
    _, errors = run(gpu, fmt, Weight(stored, "BF16"))
    np.testing.assert_allclose(errors.squared_sum, stored.size * float(stored[0, 0]) ** 2, rtol=1e-12)


@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (129, 7), (299, 270)])
def test_what_is_not_finite_is_found_with_its_first_index(gpu, dtype, bad, place):
    stored = np.ones((300, 271), NUMPY[dtype])
    stored[place] = bad
    stored[299, 270] = np.nan
    expected = rf"^\[{place[0]}, {place[1]}\] is {'nan' if place == (299, 270) else bad}$"
    with pytest.raises(NonFiniteWeightError, match=expected):
        gpu.amax(Source.of(stored, dtype))


def test_a_value_that_overflows_its_dtype_is_refused(gpu, monkeypatch):
    no_fallback(gpu, monkeypatch)
    with pytest.raises(OutOfRangeError, match=r"65504\.0 dequantizes to no finite F16"):
        run(gpu, FP8("tensor", "bfloat16"), Weight(np.full((2, 16), 65504, np.float16), "F16"))


def test_weights_by_turns_are_not_mixed_up(gpu, monkeypatch):
    """As the stream has them: the next one goes up, into a buffer used before, while one is quantized."""
    no_fallback(gpu, monkeypatch)
    buffer = gpu.host_memory(2 * 64 * 256).view(ml_dtypes.bfloat16).reshape(64, 256)
    rng = np.random.default_rng(0)
    fmt = NVFP4()
    for _ in range(20):
        buffer[...] = rng.standard_normal((64, 256)) * rng.uniform(0.01, 1)
        other = Weight((rng.standard_normal((64, 256)) * 0.1).astype(ml_dtypes.bfloat16), "BF16")
        own, ahead = Source.of(buffer, "BF16"), Source.of(other.stored, "BF16")
        amax, ahead_amax = gpu.amax(own), gpu.amax(ahead)
        for source, weight, largest in ((ahead, other.stored, ahead_amax), (own, buffer.copy(), amax)):
            parts, _ = gpu.quantize(fmt, source, largest)
            expected = fmt.quantize(weight.astype(F32))
            assert {part: parts[part].tobytes() for part in parts} == {
                part: array.tobytes() for part, array in expected.items()
            }


def test_parts_outlive_the_engine():
    weight = Weight(np.random.default_rng(0).standard_normal((64, 256)).astype(F32), "F32")
    with open_engine("auto", NF4()) as engine:
        assert engine.device.startswith("cuda:0 ")
        parts, _ = run(engine, NF4(), weight)
        run(engine, NF4(), Weight(weight.stored * 2, "F32"))
    for part, array in NF4().quantize(weight.f32).items():
        assert parts[part].tobytes() == array.tobytes()


@pytest.mark.parametrize("codes", ["nearest", "search"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("nf4", {}),
        ("nf4", {"double_quant": "none", "block_size": 128}),
        ("fp4", {}),
        ("fp4", {"two_d": False, "metric": "l1", "global_scale": "amax"}),
        ("fp8", {}),
        ("fp8", {"scaling": "channel"}),
        ("fp8", {"scaling": "block"}),
    ],
    ids=str,
)
def test_an_artifact_is_the_same_from_cpu_and_gpu(tmp_path, name, parameters, shards, codes):
    pytest.importorskip("numba")
    from surogate_quantize import make_options, quantize

    write_checkpoint(tmp_path / "source", llama(), shards=shards)
    for device in ("cpu", "cuda"):
        options = make_options(name, parameters, codes=codes)
        summary = quantize(tmp_path / "source", tmp_path / device, options, device=device)
        assert summary.device.startswith(device)
    assert contents(tmp_path / "cuda") == contents(tmp_path / "cpu")
