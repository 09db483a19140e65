"""How weights that are too large for the memory budget are cut into bands of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from surogate_formats.errors import SurogateError, UsageError
from surogate_formats.format import Format, Shape
from surogate_quantize.plan import Plan, PlannedTensor

MIB = 1 << 20

DEFAULT_MAX_MEMORY = 2 << 30
"""Bytes of memory that a run may take."""

BASE = 320 * MIB
"""Bytes that the interpreter, its libraries and compiled kernels take, about; a GPU's driver takes its own."""

SHARES = 7
"""Bands that may be in memory at a time, about: one worked on, one read ahead, a fused group, reused memory, parts."""

LARGEST = 128 * MIB
"""Bytes of a band however much memory there is: with larger ones reading and quantizing overlap less."""

SMALLEST = 8 * MIB


class MemoryBudgetError(UsageError):
    """`max_memory` is too small for the model, or for any."""


class OutOfMemoryError(SurogateError):
    """The machine had no memory left, whatever `max_memory` says."""


@contextmanager
def enough_memory() -> Iterator[None]:
    """Says in one line that memory ran out in the block, in whichever thread.

    Raises:
        OutOfMemoryError: see the class.
    """
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(
            "the machine ran out of memory; end other programs, or give a smaller `max_memory` or fewer `workers`"
        ) from error


@dataclass(frozen=True)
class Band:
    """Rows `start` to `stop` of a weight; all of them where the weight is small enough."""

    tensor: PlannedTensor
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether it is the whole weight."""
        return self.stop - self.start == self.tensor.info.shape[0]

    @property
    def last(self) -> bool:
        """Whether no band of the weight follows."""
        return self.stop == self.tensor.info.shape[0]

    @property
    def shape(self) -> Shape:
        """[rows, K]."""
        return (self.stop - self.start, *self.tensor.info.shape[1:])

    @property
    def offset(self) -> int:
        """Where it starts in the source tensor, in bytes."""
        return self.start * _row_bytes(self.tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of it in the source."""
        return (self.stop - self.start) * _row_bytes(self.tensor)


def band_bytes(max_memory: int) -> int:
    """Bytes that a weight, a band or a fused group held together may take, so that a run stays inside `max_memory`.

    Raises:
        MemoryBudgetError: no run fits.
    """
    share = (max_memory - BASE) // SHARES
    if share < SMALLEST:
        least = (BASE + SHARES * SMALLEST) // MIB
        raise MemoryBudgetError(f"`max_memory` {in_words(max_memory)}: at least {least} MiB are needed")
    return min(share, LARGEST)


def in_words(size: int) -> str:
    """A size in MiB, or in bytes where that would be none."""
    return f"{size // MIB} MiB" if size >= MIB else f"{size} bytes"


def cut_bands(fmt: Format, tensor: PlannedTensor, limit: int) -> Iterator[Band]:
    """The bands of a weight in order, each of up to `limit` bytes where the format allows one so small."""
    rows = tensor.info.shape[0]
    step = rows
    if tensor.info.nbytes > limit:
        multiple = fmt.band_rows(tensor.info.shape)
        step = max(limit // _row_bytes(tensor) // multiple, 1) * multiple
    for start in range(0, max(rows, 1), max(step, 1)):
        yield Band(tensor, start, min(start + step, rows))


def check_budget(plan: Plan, limit: int, max_memory: int) -> None:
    """Refuses a budget that the smallest band of some weight would pass.

    Raises:
        MemoryBudgetError: see the class; the message says what would be enough.
    """
    for tensor in plan.quantized:
        largest = next(cut_bands(plan.options.format, tensor, limit)).nbytes
        if BASE + SHARES * largest > max(max_memory, BASE + SHARES * limit):
            needed = -(-(BASE + SHARES * largest) // MIB)
            raise MemoryBudgetError(
                f"`max_memory` {in_words(max_memory)}: {tensor.info.name} {list(tensor.info.shape)} can't be cut into "
                f"bands that small; it takes {needed} MiB"
            )


def _row_bytes(tensor: PlannedTensor) -> int:
    return tensor.info.nbytes // max(tensor.info.shape[0], 1)
