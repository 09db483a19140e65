"""The weights of single experts inside tensors that hold all experts of a layer: `[E, in, out]` or `[E, out, in]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from surogate_formats.checkpoint.tensor_info import TensorInfo
from surogate_formats.dtypes import FLOATS, NUMPY

GATE_UP, DOWN = "gate_up_proj", "down_proj"

ROLES: Final = {GATE_UP: ("gate_proj", "up_proj"), DOWN: (DOWN,)}
"""Fused tensor to the weights in it, by the names that they have in checkpoints where each stands by itself."""

MOST_EXPERTS = 4096
"""Experts of a layer that are told apart: a header may claim any number."""

PIECE = 4 << 20
"""Bytes of a stored matrix that are in memory at a time beside what is asked for."""

Read = Callable[[memoryview, int], object]
"""Fills a buffer from a byte of the fused tensor on."""


@dataclass(frozen=True)
class Arrangement:
    """How a model type stores its fused experts.

    Attributes:
        transposed: an expert's matrix is `[in, out]`, and not `[out, in]`.
        interleaved: the outputs of gate and up alternate; else gate's come first.
        apart: whether readers of the model type take experts that stand by themselves, too.
    """

    transposed: bool
    interleaved: bool
    apart: bool

    def outputs(self, role: str, count: int) -> slice:
        """Which of `count` outputs of a stored matrix are those of a role."""
        if role == DOWN:
            return slice(0, count)
        first = ROLES[GATE_UP].index(role)
        return slice(first, count, 2) if self.interleaved else slice(first * (count // 2), (first + 1) * (count // 2))

    def weight_of(self, matrix: NDArray[Any], role: str) -> NDArray[Any]:
        """The view [out, in] of a role's weight in an expert's stored matrix."""
        by_output = matrix.T if self.transposed else matrix
        return by_output[self.outputs(role, len(by_output))]


ARRANGEMENTS: Final[Mapping[str, Arrangement]] = {
    "gpt_oss": Arrangement(transposed=True, interleaved=True, apart=False),
    "qwen3_5_moe": Arrangement(transposed=False, interleaved=False, apart=True),
    "qwen3_5_moe_text": Arrangement(transposed=False, interleaved=False, apart=True),
}
"""`model_type` of config.json to how its files hold experts."""


@dataclass(frozen=True)
class ExpertSlice:
    """One weight of one expert, as a tensor [N, K] = [out, in] of its own.

    Attributes:
        whole: the tensor that it is a part of.
        info: its name, dtype, shape and size; it need not fill the bytes between `start` and `end` alone.
        number: the expert's.
        role: `gate_proj`, `up_proj` or `down_proj`.
        arrangement: of `whole`.
    """

    whole: TensorInfo
    info: TensorInfo
    number: int
    role: str
    arrangement: Arrangement

    def fill(self, read: Read, buffer: memoryview, offset: int) -> None:
        """Fills a buffer of bytes with what follows in the weight from byte `offset` on.

        Where it begins and ends with rows, nothing beside it is larger than `PIECE`, or a row of the stored matrix.
        """
        dtype, columns = NUMPY[self.info.dtype], self.info.shape[1]
        row_bytes = columns * dtype.itemsize
        first, last = offset // row_bytes, -(-(offset + buffer.nbytes) // row_bytes)
        whole_rows = buffer.nbytes == (last - first) * row_bytes
        rows = (
            np.frombuffer(buffer, dtype).reshape(-1, columns)
            if whole_rows
            else np.empty((last - first, columns), dtype)
        )
        self._fill_rows(read, rows, first)
        if not whole_rows:
            start = offset - first * row_bytes
            buffer[:] = rows.reshape(-1).view(np.uint8).data[start : start + buffer.nbytes]

    def _fill_rows(self, read: Read, rows: NDArray[Any], first: int) -> None:
        _, height, width = self.whole.shape
        begin = self.number * height * width
        count = width if self.arrangement.transposed else height
        start, stop, step = self.arrangement.outputs(self.role, count).indices(count)
        taken = range(start, stop, step)[first : first + len(rows)]
        if self.arrangement.transposed:
            for top, piece in _pieces(read, rows.dtype, begin, (height, width), range(taken.start, taken[-1] + 1)):
                rows[:, top : top + len(piece)] = piece[:, ::step].T
        elif step == 1:
            read(_bytes(rows), (begin + taken.start * width) * rows.itemsize)
        else:
            for row, output in zip(rows, taken, strict=True):
                read(_bytes(row), (begin + output * width) * rows.itemsize)


def _pieces(
    read: Read, dtype: np.dtype[Any], begin: int, shape: tuple[int, int], columns: range
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Columns of a stored matrix that begins at an element: some rows of them, and the first's number.

    Each piece is good until the next.
    """
    height, width = shape
    apart = 2 * len(columns) < width
    low, span = (columns.start, len(columns)) if apart else (0, width)
    step = min(max(PIECE // (span * dtype.itemsize), 1), height)
    buffer = np.empty((step, span), dtype)
    for top in range(0, height, step):
        piece = buffer[: min(step, height - top)]
        for row, part in enumerate(piece) if apart else ((0, piece),):
            read(_bytes(part), (begin + (top + row) * width + low) * dtype.itemsize)
        yield top, piece[:, columns.start - low : columns.stop - low]


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def arrangement_of(config: Mapping[str, Any]) -> Arrangement | None:
    """How a model's files hold fused experts, by its `config.json`; None where that is not known."""
    text = config.get("text_config")
    kinds = (config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None)
    return next((ARRANGEMENTS[kind] for kind in kinds if isinstance(kind, str) and kind in ARRANGEMENTS), None)


def slices_of(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, tuple[ExpertSlice, ...]]:
    """Name of each tensor that holds all experts of a layer to the weights in it, expert by expert.

    None of a layer whose two tensors don't fit each other, and none whose name another tensor has.

    Args:
        tensors: every tensor of a checkpoint.
        config: its `config.json`.
    """
    arrangement = arrangement_of(config)
    found: dict[str, tuple[ExpertSlice, ...]] = {}
    if arrangement is None:
        return found
    for gate_up in [info for name, info in tensors.items() if name.endswith(f".experts.{GATE_UP}")]:
        layer = gate_up.name.removesuffix(f".{GATE_UP}")
        down = tensors.get(f"{layer}.{DOWN}")
        if down is None or not _fit(arrangement, gate_up, down):
            continue
        both = {info.name: tuple(_slices(info, layer, arrangement)) for info in (gate_up, down)}
        if not any(part.info.name in tensors for parts in both.values() for part in parts):
            found.update(both)
    return found


def _fit(arrangement: Arrangement, gate_up: TensorInfo, down: TensorInfo) -> bool:
    """Whether two tensors are [E, H, 2I] and [E, I, H], or the same transposed, of numbers that can be quantized."""
    if not (len(gate_up.shape) == len(down.shape) == 3 and {gate_up.dtype, down.dtype} <= set(FLOATS.values())):
        return False
    experts, *first = gate_up.shape
    others, *second = down.shape
    if arrangement.transposed:
        first.reverse()
        second.reverse()
    fits = experts == others and first[0] == 2 * second[1] and first[1] == second[0]
    return fits and 0 < experts <= MOST_EXPERTS and 0 not in (*first, *second)


def _slices(info: TensorInfo, layer: str, arrangement: Arrangement) -> Iterator[ExpertSlice]:
    experts, height, width = info.shape
    roles = ROLES[info.name.removeprefix(f"{layer}.")]
    outputs, inputs = (width, height) if arrangement.transposed else (height, width)
    shape = outputs // len(roles), inputs
    matrix = info.nbytes // experts
    for number in range(experts):
        start = info.start + number * matrix
        for role in roles:
            name = f"{layer}.{number}.{role}.weight"
            end = start + matrix // len(roles)
            yield ExpertSlice(info, TensorInfo(name, info.dtype, shape, start, end), number, role, arrangement)
