"""Joins the ranks that a launcher started, and says in one line when one of them is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from surogate_load.architecture import one_line
from surogate_load.errors import RankLostError, UnsupportedShardingError

_LOST = ("closed by peer", "timed out", "reset by peer", "connection refused", "broken pipe", "nccl")


@contextmanager
def process_group(timeout: float = 600.0) -> Iterator[torch.device]:
    """The ranks that `torchrun`, or `accelerate launch`, started: joined here, left at the end.

        with surogate_load.process_group() as device:
            ...  # torch.distributed works, and `device` is this rank's

    NCCL on GPUs, gloo elsewhere. A rank that is lost while another waits ends gloo's wait at once, NCCL's after the
    timeout; there torch may end the process by itself, with messages of its own.

    Args:
        timeout: seconds that a rank may let others wait.

    Raises:
        UnsupportedShardingError: no launcher started this process.
        RankLostError: another rank has ended, or lets this one wait too long.
    """
    import torch.distributed as dist

    if "RANK" not in os.environ:
        raise UnsupportedShardingError("no launcher started this process: torchrun --nproc-per-node 2 SCRIPT does")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    bound = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout),
        **bound,  # type: ignore[arg-type]
    )
    try:
        with saying_who_is_lost(timeout):
            yield device
            dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def saying_who_is_lost(timeout: float) -> Iterator[None]:
    """Turns what torch raises where another rank is lost into one line.

    Args:
        timeout: of the process group in seconds, for that line.

    Raises:
        RankLostError: another rank has ended, or lets this one wait too long.
    """
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in _LOST):
            raise
        raise RankLostError(
            f"rank {rank} of {world}: another rank has ended, or let this one wait for {timeout:g} s; its own output "
            f"says why ({one_line(error)})"
        ) from None
