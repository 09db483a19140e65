"""What the linears of a block are given: which share an input, and the inputs themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from surogate_load.block_runner import NoBlocksError

Linears = Mapping[str, nn.Linear]
"""The linears of a block by the full names of their modules, as the plan has them."""

Watched = Mapping[str, nn.Module]
"""Modules of a block by full name whose inputs are asked for: linears that are no expert's, and the experts as one."""


class _ReachedError(Exception):
    """The input that was waited for has come; the rest of the block need not run."""


def stages(watched: Watched, run: Callable[[], object]) -> list[list[str]]:
    """The modules in the order in which a block calls them; linears with one and the same input stand together.

    Args:
        watched: those of the block.
        run: runs the block once.
    """
    seen: list[tuple[str, Tensor]] = []
    with _before(watched, lambda name, x: seen.append((name, x))):
        run()
    found: list[list[str]] = []
    inputs: list[Tensor] = []
    for name, x in seen:
        same = next((index for index, other in enumerate(inputs) if other is x), None)
        if same is None or not all(isinstance(watched[each], nn.Linear) for each in (name, *found[same])):
            inputs.append(x)
            found.append([name])
        else:
            found[same].append(name)
    return found


@contextmanager
def inputs_of(watched: Watched, leaders: list[str]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that holds the latest input of each leader, while the block of code lasts."""
    latest: dict[str, Tensor] = {}
    with _before({name: watched[name] for name in leaders}, latest.__setitem__):
        yield latest


def input_of(watched: Watched, leader: str, run: Callable[[], object]) -> Tensor:
    """The input of one module; the block runs no further than there."""
    reached: list[Tensor] = []

    def stop(name: str, x: Tensor) -> None:
        reached.append(x)
        raise _ReachedError

    with _before({leader: watched[leader]}, stop), suppress(_ReachedError):
        run()
    if not reached:
        raise unused(leader)
    return reached[0]


@contextmanager
def choices_of(experts: nn.Module | None) -> Iterator[list[Tensor]]:
    """The experts that each batch's tokens are given to, int64 [tokens, k], while the block of code lasts."""
    seen: list[Tensor] = []
    hook = experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1])) if experts else None
    try:
        yield seen
    finally:
        if hook:
            hook.remove()


def unused(leader: str) -> NoBlocksError:
    """The error for a linear that some text doesn't come to."""
    return NoBlocksError(f"{leader}: isn't used for every text; leave it out with `skip`")


@contextmanager
def _before(watched: Watched, told: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, arguments: told(name, arguments[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in watched.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
