"""Starts ranks, each of which goes through checks and leaves what it found in files."""

import faulthandler
import gc
import os
import shutil
import signal
import warnings
from pathlib import Path

import torch
from runtime.ranks.data_parallel import ddp, recipes, reduce_amax
from runtime.ranks.fully_sharded import adapters, compiled, experts, generated, hsdp, options, prepared, train
from runtime.ranks.models import join
from runtime.ranks.refused import kill_one, refusals
from runtime.ranks.saving import loaded, resumed, state
from runtime.ranks.trainer import trainer, trainer_of_experts

IMPORTED = (
    "peft",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
)
"""What takes longer to import than to use."""


CHECKS = (
    ddp, reduce_amax, train, experts, options, adapters, generated, prepared, compiled, state, loaded, recipes,
    refusals, trainer, trainer_of_experts, kill_one,
)  # fmt: skip


def worker(rank, world, folder, paths, names):
    """Runs checks one after the other; each rank leaves what it found in a file."""
    folder = Path(folder)
    faulthandler.enable()
    gc.freeze()  # what was imported needs no looking through
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    join(rank, world, folder)
    for check in (*CHECKS[:-1], hsdp, resumed, CHECKS[-1]):
        if check.__name__ in names:
            torch.save(check(paths, folder), folder / f"{check.__name__}-{world}-{rank}")
    torch.distributed.destroy_process_group()


def run_ranks(world, folder, paths, names):
    """What each of some checks gave on every rank: `found[check][rank]`; in the last one the last rank is killed.

    Ranks are forked from a process of their own, which has imported what all of them need.
    """
    codes, errors = _ended(world, folder, paths, names)
    if -signal.SIGABRT in codes:  # seen once in some thirty runs, without a word, on a machine that was busy otherwise
        warnings.warn(f"a rank aborted: {codes}, {errors}", stacklevel=2)
        shutil.rmtree(folder)
        folder.mkdir()
        codes, errors = _ended(world, folder, paths, names)
    assert codes[:-1] == [0] * (world - 1), (codes, *errors)
    assert codes[-1] == (-signal.SIGKILL if "kill_one" in names else 0), (codes, *errors)
    files = {name: [folder / f"{name}-{world}-{rank}" for rank in range(world)] for name in names}
    return {name: [torch.load(file) for file in own if file.exists()] for name, own in files.items()}


def _ended(world, folder, paths, names):
    """Exit codes of the ranks, and what those that failed have to say."""
    torch.multiprocessing.set_forkserver_preload(list(IMPORTED))
    arguments = (world, str(folder), paths, names)
    started = torch.multiprocessing.start_processes(worker, arguments, world, join=False, start_method="forkserver")
    for process in started.processes:
        process.join(300)
    errors = [Path(file).read_bytes().decode(errors="replace") for file in started.error_files if Path(file).exists()]
    return [process.exitcode for process in started.processes], errors
