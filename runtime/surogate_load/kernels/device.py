"""Which devices can run the kernels, and the kernels loaded on each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from surogate_load.kernels.source import MODULES, OPTIONS, kernel_names, source

LEAST_CAPABILITY = (7, 5)
"""The least CUDA compute capability that the kernels compile for."""

Functions = Mapping[str, Any]
"""Kernel name to the `cupy.cuda.Function` that launches it on one device."""

_loaded: dict[int, Functions | None] = {}


def load_kernels(device: torch.device | str | int | None = None) -> bool:
    """Compiles and loads every kernel on a CUDA device, unless that has happened.

    The first use of an op does so too. Call it before a CUDA graph is captured: nothing can be loaded meanwhile.

    Args:
        device: by default the current one.

    Returns:
        Whether the device runs the kernels. If not, a warning has said why, once, and the ops compute in plain torch.
    """
    index = torch.cuda._utils._get_device_index(device, optional=True)
    return functions_on(index) is not None


def functions_on(index: int) -> Functions | None:
    """The kernels of the device with this index, loaded on first use; None where it can't run them."""
    try:
        return _loaded[index]
    except KeyError:
        pass
    reason = why_unusable(torch.cuda.get_device_capability(index), torch.version.cuda)
    functions = None
    if reason is None:
        functions, reason = _try_to_load(index)
    if reason is not None:
        warnings.warn(f"cuda:{index} dequantizes in plain torch, slowly: {reason}", RuntimeWarning, stacklevel=3)
    return _loaded.setdefault(index, functions)


def why_unusable(capability: tuple[int, int], torch_cuda: str | None) -> str | None:
    """What keeps a device from running the kernels, and what to do about it; None if nothing does.

    Args:
        capability: the device's compute capability.
        torch_cuda: the CUDA version that torch is built for, as `13.0`; None for another platform.
    """
    if torch_cuda is None:
        return "this torch is not built for CUDA"
    if capability < LEAST_CAPABILITY:
        return f"the kernels need compute capability 7.5, this device has {capability[0]}.{capability[1]}"
    major = int(torch_cuda.partition(".")[0])
    try:
        import cupy
    except ImportError as error:
        return f"CuPy can't be imported ({_first_line(error)}): pip install surogate-quant[cuda{major}]"
    built_for = cupy.cuda.runtime.runtimeGetVersion() // 1000
    if built_for != major:
        return (
            f"CuPy is built for CUDA {built_for}, torch for CUDA {major}: "
            f"pip uninstall cupy-cuda{built_for}x, then pip install surogate-quant[cuda{major}]"
        )
    return None


def _try_to_load(index: int) -> tuple[Functions | None, str | None]:
    try:
        with torch.cuda.device(index):
            return _load(), None
    except Exception as error:  # NVRTC missing, a driver too old for its code, a cache that can't be written, ...
        return None, f"the kernels can't be compiled or loaded ({type(error).__name__}: {_first_line(error)})"


def _load() -> Functions:
    import cupy

    torch.cuda.current_stream().synchronize()  # makes torch's context the current one, also on this thread
    functions = {}
    for module in MODULES:
        compiled = cupy.RawModule(code=source(module), options=OPTIONS)
        for name in kernel_names(module):
            kernel = compiled.get_function(name)
            kernel.num_regs  # noqa: B018  (the driver loads a kernel's code when it is first asked about it)
            functions[name] = kernel.kernel
    return functions


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
