"""`hadamard16` on CUDA: one launch; plain torch where a device can't run the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from surogate_load.kernels.device import functions_on
from surogate_load.kernels.launch import launch
from surogate_load.kernels.source import CHUNK, HADAMARD, HADAMARD_THREADS
from surogate_load.ops import hadamard as _plain  # noqa: F401  (defines the op)
from surogate_load.ops.library import PLAIN, accelerate

_NAME = "hadamard16"
_KERNELS = {
    torch.float32: "hadamard16_float32",
    torch.bfloat16: "hadamard16_bfloat16",
    torch.float16: "hadamard16_float16",
}
_ALIGNMENT = 16
"""Of the bytes that a thread loads at once."""


def _on_cuda(x: Tensor) -> Tensor:
    device = x.get_device()
    functions = functions_on(device)
    if functions is None or x.dtype not in _KERNELS or not x.numel():
        plain: Tensor = PLAIN[_NAME](x)
        return plain
    x = x.contiguous()
    x = x.clone() if x.data_ptr() % _ALIGNMENT else x
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    chunks = x.numel() // CHUNK
    packed = HADAMARD.pack(x.data_ptr(), out.data_ptr(), chunks)
    launch(functions[_KERNELS[x.dtype]], device, -(-chunks // HADAMARD_THREADS), HADAMARD_THREADS, packed)
    return out


accelerate(_NAME, _on_cuda)
