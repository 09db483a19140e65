"""What the linears of a block are given: which share an input, and the inputs themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from surogate_load.block_runner import NoBlocksError

Linears = Mapping[str, nn.Linear]
"""The linears of a block by the full names of their modules, as the plan has them."""


class _ReachedError(Exception):
    """The input that was waited for has come; the rest of the block need not run."""


def stages(linears: Linears, run: Callable[[], object]) -> list[list[str]]:
    """The linears in the order in which a block calls them; those with one and the same input stand together.

    Args:
        linears: those of the block.
        run: runs the block once.
    """
    seen: list[tuple[str, Tensor]] = []
    with _before(linears, lambda name, x: seen.append((name, x))):
        run()
    found: list[list[str]] = []
    inputs: list[Tensor] = []
    for name, x in seen:
        same = next((index for index, other in enumerate(inputs) if other is x), None)
        if same is None:
            inputs.append(x)
            found.append([name])
        else:
            found[same].append(name)
    return found


@contextmanager
def inputs_of(linears: Linears, leaders: list[str]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that holds the latest input of each leader, while the block of code lasts."""
    latest: dict[str, Tensor] = {}
    with _before({name: linears[name] for name in leaders}, latest.__setitem__):
        yield latest


def input_of(linears: Linears, leader: str, run: Callable[[], object]) -> Tensor:
    """The input of one linear; the block runs no further than there."""
    reached: list[Tensor] = []

    def stop(name: str, x: Tensor) -> None:
        reached.append(x)
        raise _ReachedError

    with _before({leader: linears[leader]}, stop), suppress(_ReachedError):
        run()
    if not reached:
        raise unused(leader)
    return reached[0]


def unused(leader: str) -> NoBlocksError:
    """The error for a linear that some text doesn't come to."""
    return NoBlocksError(f"{leader}: isn't used for every text; leave it out with `skip`")


@contextmanager
def _before(linears: Linears, told: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, arguments: told(name, arguments[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
