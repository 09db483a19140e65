"""Every kernel of the CUDA engine compiles for every supported GPU, keeps its values in registers, flushes nothing."""

import ctypes
import re

import numpy as np
import pytest
from runtime import nvrtc
from runtime.nvrtc import compile_cuda
from runtime.test_kernels_compile import ARCHITECTURES, CUPY_OPTIONS, local_memory

from surogate_formats.tables import NF4_CODEBOOK, NF4_MIDPOINTS
from surogate_quantize.cuda.source import MODULES, OPTIONS, SOURCES, kernel_names, source


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_local_memory(module, architecture):
    log = compile_cuda(source(module), architecture, (*OPTIONS, *CUPY_OPTIONS))
    assert local_memory(log) == dict.fromkeys(kernel_names(module), (0, 0, 0))
    assert "warning" not in log


def test_every_kernel_exists_for_every_source_dtype():
    kernels = {
        "amax": ["amax"],
        "nf4": ["nf4", "nf4_search"],
        "nvfp4": [f"nvfp4_{side}d{search}" for search in ("", "_search") for side in (1, 2)],
        "fp8": ["fp8_amax", "fp8", "fp8_search_channels", "fp8_search_tiles"],
    }
    assert {module: kernel_names(module) for module in MODULES} == {
        module: [f"{name}_{dtype}" for name in names for dtype in SOURCES] for module, names in kernels.items()
    }


@pytest.mark.parametrize(("name", "table"), [("NF4_CODEBOOK", NF4_CODEBOOK), ("NF4_MIDPOINTS", NF4_MIDPOINTS)])
def test_tables_are_those_of_the_formats(name, table):
    (text,) = re.findall(rf"^#define {name} \{{(.*)\}}$", source("nf4"), re.MULTILINE)
    values = np.array([float.fromhex(value.strip().removesuffix("f")) for value in text.split(",")], dtype=np.float32)
    np.testing.assert_array_equal(values.view(np.uint32), table.view(np.uint32))


@pytest.mark.parametrize("module", MODULES)
def test_no_instruction_flushes_subnormals(module):
    """Under CuPy's -ftz=true a C operator or comparison on floats would: all of them have to go through ptx.cu."""
    ptx = ptx_of(source(module), (*OPTIONS, *CUPY_OPTIONS))
    assert f"{kernel_names(module)[0]}(" in ptx
    assert ".ftz" not in ptx
    assert "fma.rn.f32" not in ptx


def test_a_flushing_instruction_would_be_seen():
    text = 'extern "C" __global__ void adds(float* a) { a[0] += a[1]; }'
    assert "add.rn.ftz.f32" in ptx_of(text, (*OPTIONS, *CUPY_OPTIONS))


def ptx_of(text, options):
    library, program, size = nvrtc._library(), ctypes.c_void_p(), ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None) == 0
    arguments = [b"--gpu-architecture=compute_90", *(option.encode() for option in options)]
    assert library.nvrtcCompileProgram(program, len(arguments), (ctypes.c_char_p * len(arguments))(*arguments)) == 0
    assert library.nvrtcGetPTXSize(program, ctypes.byref(size)) == 0
    ptx = ctypes.create_string_buffer(size.value)
    assert library.nvrtcGetPTX(program, ptx) == 0
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx.value.decode()
