"""Every kernel compiles for every supported GPU, and keeps its values in registers."""

import re

import numpy as np
import pytest
from runtime.nvrtc import compile_cuda

from surogate_formats.dynamic_absmax import DYNAMIC_MAP
from surogate_formats.tables import E2M1_VALUES, NF4_CODEBOOK
from surogate_load.kernels.source import MODULES, OPTIONS, RESULTS, kernel_names, source

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

CUPY_OPTIONS = ("-ftz=true",)
"""What CuPy adds."""

KERNEL = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
    re.DOTALL,
)


def local_memory(log):
    """Kernel name to the bytes of stack, spill stores and spill loads."""
    return {name: tuple(map(int, sizes)) for name, *sizes in KERNEL.findall(log)}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_local_memory(module, architecture):
    log = compile_cuda(source(module), architecture, (*OPTIONS, *CUPY_OPTIONS))
    assert local_memory(log) == dict.fromkeys(kernel_names(module), (0, 0, 0))
    assert "warning" not in log


def test_local_memory_would_be_seen():
    body = (
        "float b[64]; for (int i = 0; i < 64; ++i) b[i] = a[i * n]; for (int i = 0; i < 64; ++i) a[i] = b[i * n & 63];"
    )
    log = compile_cuda(f'extern "C" __global__ void indexed(float* a, int n) {{ {body} }}', "sm_90", ())
    assert local_memory(log)["indexed"][0] >= 256


def test_a_broken_source_fails():
    with pytest.raises(AssertionError, match="error"):
        compile_cuda(source("nf4") + "\nbroken", "sm_90", OPTIONS)


def test_every_format_has_a_kernel_for_every_result():
    assert {name: len(kernel_names(name)) for name in MODULES} == {
        "nf4": 12,
        "nvfp4": 4,
        "fp8": 4,
        "cross_entropy": 3,
        "quantize_fp8": 9,
        "transpose": 1,
        "quantize_nvfp4": 15,
        "hadamard": 3,
    }
    for module in ("nf4", "nvfp4", "fp8"):
        assert {name.split("_", name.count("_") - name.endswith("e4m3fn"))[-1] for name in kernel_names(module)} == set(
            RESULTS
        )


@pytest.mark.parametrize(
    ("name", "table"), [("NF4_CODEBOOK", NF4_CODEBOOK), ("DYNAMIC_MAP", DYNAMIC_MAP), ("E2M1_VALUES", E2M1_VALUES)]
)
def test_tables_are_those_of_the_formats(name, table):
    (text,) = re.findall(rf"^#define {name} \{{(.*)\}}$", source("nf4"), re.MULTILINE)
    values = np.array([float.fromhex(value.strip().removesuffix("f")) for value in text.split(",")], dtype=np.float32)
    np.testing.assert_array_equal(values.view(np.uint32), table.view(np.uint32))
