"""What torchrun tells a process of its rank; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """How many processes torchrun has started; 1 without it."""
    started = all(os.environ.get(name) for name in VARIABLES)
    return int(os.environ["WORLD_SIZE"]) if started and os.environ["WORLD_SIZE"].isdecimal() else 1


def is_first_rank() -> bool:
    """Whether this is the process that speaks for all."""
    return world_size() == 1 or os.environ["RANK"] == "0"


def local_share(count: int) -> int:
    """This process's share of `count` CPUs of its machine."""
    return max(count // int(os.environ["LOCAL_WORLD_SIZE"]), 1) if world_size() > 1 else count


@contextmanager
def own_gpu() -> Iterator[None]:
    """Leaves of the GPUs that this process sees the one of its local rank, none where there are fewer; before CUDA."""
    index, visible = int(os.environ["LOCAL_RANK"]), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index)] * (index + 1) if visible is None else [name for name in visible.split(",") if name.strip()]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[index] if index < len(names) else ""
    try:
        yield
    finally:
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
