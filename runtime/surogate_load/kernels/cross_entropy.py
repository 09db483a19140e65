"""`cross_entropy_` on CUDA: one launch; plain torch where a device can't run the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from surogate_load.kernels.device import functions_on
from surogate_load.kernels.launch import launch
from surogate_load.kernels.source import CHUNK, CROSS_ENTROPY, CROSS_ENTROPY_THREADS
from surogate_load.ops import cross_entropy as _plain  # noqa: F401  (defines the op)
from surogate_load.ops.library import PLAIN, accelerate

_NAME = "cross_entropy_"
_KERNELS = {
    torch.float32: "cross_entropy_float32",
    torch.bfloat16: "cross_entropy_bfloat16",
    torch.float16: "cross_entropy_float16",
}


def _on_cuda(logits: Tensor, labels: Tensor, factor: Tensor, scale: float, cap: float, gradient: bool) -> Tensor:
    device = logits.get_device()
    functions = functions_on(device)
    if functions is None or logits.dtype not in _KERNELS or not logits.is_contiguous():
        plain: Tensor = PLAIN[_NAME](logits, labels, factor, scale, cap, gradient)
        return plain
    rows, columns = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        labels, factor = labels.contiguous(), factor.contiguous()
        aligned = columns % CHUNK == 0 and logits.data_ptr() % (CHUNK * logits.element_size()) == 0
        addresses = (tensor.data_ptr() for tensor in (logits, labels, factor, loss))
        packed = CROSS_ENTROPY.pack(*addresses, columns, scale, cap, gradient, aligned)
        launch(functions[_KERNELS[logits.dtype]], device, rows, CROSS_ENTROPY_THREADS, packed)
    return loss


accelerate(_NAME, _on_cuda)
