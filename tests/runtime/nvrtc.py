"""NVRTC without a GPU: compiles CUDA source to machine code and tells what the compiler said."""

import ctypes
from functools import cache
from pathlib import Path

import nvidia


@cache
def _library():
    found = sorted(path for root in nvidia.__path__ for path in Path(root).glob("cu*/lib/libnvrtc.so.*"))
    assert found, "no NVRTC: pip install nvidia-cuda-nvrtc"
    return ctypes.CDLL(str(found[-1]))


def compile_cuda(source, architecture, options):
    """The compiler's log, with registers, stack and spills of each kernel; an AssertionError holds it on failure."""
    nvrtc, program = _library(), ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
    arguments = [f"--gpu-architecture={architecture}", "--ptxas-options=-v", *options]
    encoded = (ctypes.c_char_p * len(arguments))(*(argument.encode() for argument in arguments))
    status = nvrtc.nvrtcCompileProgram(program, len(arguments), encoded)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode()
    assert status == 0, text
    return text
