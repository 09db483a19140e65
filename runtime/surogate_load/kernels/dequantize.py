"""The dequantize ops on CUDA, one launch each; the plain-torch ops take over where a device can't run the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from surogate_load.kernels.device import functions_on
from surogate_load.kernels.launch import launch_weight
from surogate_load.kernels.weights import DESCRIBE, SUFFIXES
from surogate_load.ops import dequantize as _plain  # noqa: F401  (defines the ops)
from surogate_load.ops.library import PLAIN, accelerate

_REMEMBERED = 1 << 14

_Prepared = tuple[str, tuple[int, int], int, bytes]


def _on_cuda(name: str) -> Callable[..., Tensor]:
    describe, plain = DESCRIBE[name], PLAIN[name]
    prepared: dict[tuple[Any, ...], _Prepared] = {}

    def kernel(*arguments: Any) -> Tensor:
        codes, dtype = arguments[0], arguments[-2]
        device = codes.get_device()
        functions = functions_on(device)
        if functions is None or dtype not in SUFFIXES:
            result: Tensor = plain(*arguments)
            return result
        key = _key(arguments)
        found = prepared.get(key) if key else None
        if found is None:
            described = describe(*arguments[:-2], arguments[-1])
            found = (described.kernel, described.shape, described.tiles, described.packed())
            if key:
                _remember(prepared, key, found)
        prefix, shape, tiles, packed = found
        out = torch.empty(shape, dtype=dtype, device=codes.device)
        if tiles:
            launch_weight(functions[prefix + SUFFIXES[dtype]], device, tiles, out.data_ptr(), packed)
        return out

    return kernel


def _key(arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that the packed structure depends on; None where a tensor isn't contiguous, and so a copy is pointed to."""
    key: list[Any] = [arguments[0].shape]
    for argument in arguments:
        if isinstance(argument, Tensor):
            if not argument.is_contiguous():
                return None
            key += (argument.data_ptr(), argument.dtype)
        else:
            key.append(argument)
    return tuple(key)


def _remember(prepared: dict[tuple[Any, ...], _Prepared], key: tuple[Any, ...], found: _Prepared) -> None:
    if len(prepared) >= _REMEMBERED:
        prepared.clear()
    prepared[key] = found


def _ignoring_gradient(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda gradient, *arguments: kernel(*arguments)


for _name in DESCRIBE:
    _kernel = _on_cuda(_name)
    accelerate(_name, _kernel)
    accelerate(f"{_name}_for_backward", _ignoring_gradient(_kernel))
