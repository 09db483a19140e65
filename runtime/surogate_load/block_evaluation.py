"""Compares two models block by block: in memory are a block, what is no block of either, and a window of the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from torch import Tensor, nn, split

from surogate_formats.errors import SurogateError
from surogate_load.activations import Activations
from surogate_load.architecture import one_line
from surogate_load.block_runner import BlockRunner, NoBlocksError
from surogate_load.divergence import POSITIONS, Evaluation, Sums
from surogate_load.lora_factors import LoraFactors

Adapter = Mapping[str, LoraFactors]
"""Factors by the full name of the module that they are for."""


class NoRoomForActivationsError(SurogateError):
    """The disk refuses to take the hidden states of the text."""


def evaluate_blocks(model: BlockRunner, reference: BlockRunner, ids: Tensor, adapter: Adapter) -> Evaluation:
    """Compares a model with a reference. The hidden states of the text are in temporary files.

    Args:
        model: runs the model that is compared.
        reference: runs another with the same vocabulary.
        ids: int64 [windows, tokens]; a window never sees another.
        adapter: of the model; its modules are linears of blocks.

    Raises:
        NoBlocksError: one of them can't be run block by block, or the adapter is for something else.
        NoRoomForActivationsError: see the class.
        OtherVocabularyError: the vocabularies differ.
    """
    for runner in (model, reference):
        runner.check_blocks()
    if stray := next((name for name in adapter if not isinstance(model.module(name), nn.Linear)), None):
        raise NoBlocksError(f"{model.name}: its adapter is for {stray}, which is no linear of a block")
    with _on_disk() as folder, ExitStack() as stack:
        expected = stack.enter_context(_behind_blocks(reference, ids, folder / "reference", {}))
        found = stack.enter_context(_behind_blocks(model, ids, folder / "model", adapter))
        sums = Sums()
        for window, *hidden in zip(ids, expected, found, strict=True):
            # Row by row of the text's positions: logits of a whole window take vocabulary x context values.
            pieces = (split(states, POSITIONS, 1) for states in hidden)
            for number, (one, other) in enumerate(zip(*pieces, strict=True)):
                start = number * POSITIONS
                following = window[start + 1 : start + 1 + one.shape[1]]
                sums.add(_log_probabilities(reference, one), _log_probabilities(model, other), following)
    return sums.evaluation


@contextmanager
def _behind_blocks(runner: BlockRunner, ids: Tensor, path: Path, adapter: Adapter) -> Iterator[Activations]:
    """The hidden states behind the last block, a window at a time, for as long as the block of code lasts."""
    first = runner.embed(ids[:1])
    hidden = Activations(path, tuple(first.shape), len(ids), first.dtype, runner.device)
    try:
        for position, window in enumerate(ids):
            hidden.write(position, runner.embed(window.unsqueeze(0)))
        for index in range(runner.count):
            with runner.block(index) as block, _adapted(block, f"{runner.prefix}.{index}.", adapter):
                for position, states in enumerate(hidden):
                    hidden.write(position, runner.run(index, block, states))
        yield hidden
    finally:
        hidden.close()


@contextmanager
def _adapted(block: nn.Module, prefix: str, adapter: Adapter) -> Iterator[None]:
    """Adds an adapter's products to the linears of a block."""
    with ExitStack() as stack:
        for name, factors in adapter.items():
            if name.startswith(prefix):
                linear = block.get_submodule(name.removeprefix(prefix))
                handle = linear.register_forward_hook(lambda _, x, y, factors=factors: factors.add(x[0], y))
                stack.callback(handle.remove)
        yield


def _log_probabilities(runner: BlockRunner, hidden: Tensor) -> Tensor:
    return runner.logits(hidden.to(runner.device))[0].float().log_softmax(-1)


@contextmanager
def _on_disk() -> Iterator[Path]:
    try:
        with TemporaryDirectory(prefix="surogate-evaluate-") as folder:
            yield Path(folder)
    except OSError as error:
        raise NoRoomForActivationsError(
            f"{gettempdir()}: the text's hidden states can't be written ({one_line(error)}); free some space, or let "
            "TMPDIR name another place"
        ) from error
