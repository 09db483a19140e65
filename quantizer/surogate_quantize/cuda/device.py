"""Whether there is a GPU that can run the kernels, and the kernels loaded on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surogate_quantize.cuda.errors import NoCudaError, first_line
from surogate_quantize.cuda.source import OPTIONS, kernel_names, source

LEAST_CAPABILITY = (7, 5)
"""The least CUDA compute capability that the kernels compile for."""

INDEX = 0
"""The GPU that is used: the first one that CUDA_VISIBLE_DEVICES leaves."""

Functions = Mapping[str, Any]
"""Kernel name to the `cupy.cuda.Function` that launches it."""


def find_gpu() -> str:
    """The index and the name of the GPU.

    Raises:
        NoCudaError: CuPy can't be used, or there is no GPU for it.
    """
    reason = _why_unusable()
    if reason is not None:
        raise NoCudaError(f"`device='cuda'`: {reason}; or use `device='cpu'`")
    from cupy.cuda import runtime

    return f"cuda:{INDEX} {runtime.getDeviceProperties(INDEX)['name'].decode()}"


def _why_unusable() -> str | None:
    """What keeps the kernels from running, and what to do about it; None if nothing does."""
    try:
        import cupy
    except Exception as error:  # a library of CuPy's that can't be loaded is no ImportError
        return f"CuPy can't be imported ({first_line(error)}): pip install 'surogate-quant[cuda13]', or [cuda12]"
    runtime = cupy.cuda.runtime
    try:
        built_for, driver = runtime.runtimeGetVersion() // 1000, runtime.driverGetVersion() // 1000
        if 0 < driver < built_for:
            return (
                f"CuPy is built for CUDA {built_for}, the driver for CUDA {driver}: "
                f"pip uninstall cupy-cuda{built_for}x, then pip install 'surogate-quant[cuda{driver}]'"
            )
        if not runtime.getDeviceCount():
            return "there is no GPU: see what nvidia-smi and CUDA_VISIBLE_DEVICES say"
        properties = runtime.getDeviceProperties(INDEX)
    except runtime.CUDARuntimeError as error:
        return f"there is no usable GPU ({first_line(error)}): see what nvidia-smi and CUDA_VISIBLE_DEVICES say"
    capability = (properties["major"], properties["minor"])
    if capability < LEAST_CAPABILITY:
        return f"the kernels need compute capability 7.5, this GPU has {capability[0]}.{capability[1]}: take another"
    return None


def load_module(module: str) -> Functions:
    """Compiles a module of `surogate_quantize.cuda.source` (or finds it in CuPy's cache on disk) and loads it.

    Raises:
        NoCudaError: NVRTC is missing, or the driver is too old for what it makes.
    """
    import cupy

    try:
        with cupy.cuda.Device(INDEX):
            compiled = cupy.RawModule(code=source(module), options=OPTIONS)
            return {name: compiled.get_function(name).kernel for name in kernel_names(module)}
    except Exception as error:  # a compiler's, a loader's, a cache that can't be written: CuPy has a class for each
        text = f"the kernels can't be compiled or loaded ({type(error).__name__}: {first_line(error)})"
        raise NoCudaError(f"`device='cuda'`: {text}; use `device='cpu'`") from error
