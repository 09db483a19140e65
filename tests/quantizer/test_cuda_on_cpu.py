"""The CUDA engine with its kernels compiled for the CPU: every byte and every error as the CPU engine has them."""

import shutil
import sys
from itertools import product

import numpy as np
import pytest
from formats import cases
from formats.cases import FORMATS, KINDS, SOURCE_DTYPES, Weight, fitting, name_of
from quantizer.cuda_on_cpu import CpuKernels
from quantizer.test_cuda_engine import FakeCupy

from surogate_formats.errors import OutOfRangeError
from surogate_quantize.cuda.engine import CudaEngine
from surogate_quantize.cuda.formats import QUANTIZERS
from surogate_quantize.engine import CpuEngine
from surogate_quantize.source import Source

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs g++ and Linux"
)

KNOWN = [fmt for fmt in FORMATS if QUANTIZERS[fmt.name].knows(fmt)]
SHAPES = [(1, 16), (3, 17), (17, 48), (130, 131), (33, 144), (5, 1040), (260, 64)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return CpuKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def cuda(kernels, monkeypatch):
    fake = FakeCupy(kernels=kernels)
    for name, module in fake.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with CudaEngine(FORMATS[0], 1) as engine:
        yield engine


def run(engine, fmt, source, search):
    try:
        return engine.quantize(fmt, source, engine.amax(source), search=search)
    except OutOfRangeError as error:
        return str(error)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("fmt", KNOWN, ids=name_of)
def test_every_kind_of_value(cuda, kernels, fmt, search):
    kernels.launched.clear()
    with CpuEngine(1) as cpu:
        for number, kind in enumerate(KINDS):
            dtype, shape = SOURCE_DTYPES[number % 3], SHAPES[number % len(SHAPES)]
            stored = cases._finite(kind(np.random.default_rng(number), fitting(fmt, shape)), dtype)
            source = Source.of(Weight(stored, dtype).stored, dtype)
            found, expected = (run(engine, fmt, source, search) for engine in (cuda, cpu))
            if isinstance(expected, str):
                assert found == expected
                continue
            assert found[1] == expected[1]
            for part, array in expected[0].items():
                assert found[0][part].tobytes() == array.tobytes(), (kind.__name__, part)
    assert any("_search" in name for name in kernels.launched) == (search and vars(fmt).get("scaling") != "tensor")
    assert {name.partition("_")[0] for name in kernels.launched} == {"amax", QUANTIZERS[fmt.name].module}


def test_groups_of_blocks_that_are_coarse_and_rows_of_many_tiles(cuda):
    """An outlier makes the legal absmax of its group lie far apart; rows longer than a thread block takes at once."""
    stored = np.random.default_rng(0).standard_normal((130, 1008)).astype(np.float32) * np.float32(0.02)
    stored[77, 501] = 40
    source = Source.of(stored, "F32")
    one_of_each = {(fmt.name, fmt.block_size if fmt.name == "nf4" else vars(fmt).get("scaling")): fmt for fmt in KNOWN}
    with CpuEngine(1) as cpu:
        for fmt, search in product(one_of_each.values(), (False, True)):
            found, expected = (run(engine, fmt, source, search) for engine in (cuda, cpu))
            assert found[1] == expected[1]
            assert {part: array.tobytes() for part, array in found[0].items()} == {
                part: array.tobytes() for part, array in expected[0].items()
            }
