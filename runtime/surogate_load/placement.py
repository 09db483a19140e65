"""Modules whose tensors move between devices but keep their dtype: scales must survive `.to(torch.bfloat16)`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Mover = Callable[[Tensor], Tensor]


def move_only(tensor: Tensor, move: Mover) -> Tensor:
    """What `move` makes of the tensor's device and storage, without what it does to its dtype.

    The tensor's bytes go through `move` as integers, which casts leave alone.
    """
    moved = move(tensor.reshape(-1).view(torch.uint8))
    if moved.dtype != torch.uint8:  # Module.type() casts integers too
        return tensor.to(moved.device)
    return moved.view(tensor.dtype).reshape(tensor.shape)


def cast_by(move: Mover, dtype: torch.dtype) -> torch.dtype:
    """The dtype that `move` gives to a floating-point tensor of `dtype`."""
    return move(torch.empty(0, dtype=dtype)).dtype


class FixedDtypeModule(nn.Module):
    """A module whose own buffers keep their dtype under `.to()`, `.half()`, `.float()`."""

    def _apply(self, fn: Mover, recurse: bool = True) -> FixedDtypeModule:
        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = move_only(buffer, fn)
        return self
