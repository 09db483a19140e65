"""Which of torch's attention kernels a training step takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.nn.attention import SDPBackend

_HOPPER = (9, 0)
_CUDNN: int = SDPBackend.CUDNN_ATTENTION.value


@contextmanager
def fastest_attention() -> Iterator[None]:
    """Has torch ask cuDNN's kernels first where their backward is the fastest, from Hopper on.

    Kinds that were turned off stay off. (torch's `sdpa_kernel` would take ten times as long, once for each layer.)
    """
    if not (torch.cuda.is_available() and _is_hopper(torch.cuda.current_device())):
        yield
        return
    before = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order([_CUDNN, *(kind for kind in before if kind != _CUDNN)])
    try:
        yield
    finally:
        torch._C._set_sdp_priority_order(before)


@cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= _HOPPER
