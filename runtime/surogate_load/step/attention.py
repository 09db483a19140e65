"""Which of torch's attention kernels a training step takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_HOPPER = (9, 0)
_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@contextmanager
def fastest_attention() -> Iterator[None]:
    """Prefers cuDNN's kernels where their backward is the fastest (from Hopper on); others where they can't be used."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= _HOPPER:
        with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
            yield
    else:
        yield
