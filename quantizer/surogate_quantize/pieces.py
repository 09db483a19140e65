"""How each format's work is cut into pieces for the CPU kernels; a new format is one function, one row in `CUTTERS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from surogate_formats.dtypes import NUMPY
from surogate_formats.format import Format, Parts
from surogate_formats.fp8 import FP8, TILE
from surogate_formats.nf4 import BLOCKS_PER_GROUP, NF4
from surogate_formats.nvfp4 import BLOCK, NVFP4
from surogate_formats.search import FP8_MULTIPLIERS
from surogate_quantize.source import Source
from surogate_quantize.weight_errors import Sums

Work: TypeAlias = Callable[[], Sums]

PIECE = 2**19
"""Values in a piece, about: enough to keep a thread busy for a millisecond, few enough to share a weight out."""


Stages: TypeAlias = Iterator[list[Work]]
"""Lists of pieces of work: each list is made when all pieces before it are done."""


@dataclass(frozen=True)
class Shared:
    """What the pieces of a weight share; where the source is a band of a weight's rows, it is the whole weight's.

    Attributes:
        amax: the largest magnitude of its fused group.
        unit: error units in 1 (`kernels.errors`).
        absmax_mean: the mean of all blocks' absmax, for NF4 with dynamic double quantization; None finds the source's.
        search: whether scales are searched for (`Format.quantize`).
    """

    amax: np.float32
    unit: np.float32
    absmax_mean: np.float32 | None = None
    search: bool = False


def cut(fmt: Format, source: Source, shared: Shared) -> tuple[Parts, Stages]:
    """Empty parts for the source, and the pieces of work that fill them; the cuts depend on the shape alone."""
    parts: Parts = {
        part: np.empty(spec.shape, NUMPY[spec.dtype]) for part, spec in fmt.part_specs(source.raw.shape).items()
    }
    return parts, CUTTERS[fmt.name](fmt, source, parts, shared)


def _nf4(fmt: NF4, source: Source, parts: Parts, shared: Shared) -> Stages:
    """With dynamic double quantization the mean of all absmax stands between two passes over the weight."""
    from surogate_quantize.kernels.nf4_absmax import mean_absmax

    if fmt.double_quant == "dynamic" and shared.absmax_mean is None:
        absmax = np.empty(parts["absmax"].shape, np.float32)
        yield cut_absmax(fmt, source, absmax)
        parts["nested_offset"][0] = mean_absmax(absmax)
    elif fmt.double_quant == "dynamic":
        parts["nested_offset"][0] = shared.absmax_mean
    yield [_nf4_piece(fmt, source, parts, shared, *place) for place in _whole_groups(source, fmt)]


def cut_absmax(fmt: NF4, source: Source, absmax: NDArray[np.float32]) -> list[Work]:
    """The pieces of work that fill float32 [blocks]."""
    from surogate_quantize.kernels.nf4_absmax import block_absmax

    flat, what = source.raw.reshape(-1), (source.kind, source.mask, fmt.block_size)
    return [
        _bound(block_absmax, flat[values], *what, absmax[blocks]) for values, blocks, _ in _whole_groups(source, fmt)
    ]


def _whole_groups(source: Source, fmt: NF4) -> Iterator[tuple[slice, slice, slice]]:
    """Values, blocks and groups of blocks of each piece."""
    span = fmt.block_size * BLOCKS_PER_GROUP
    step = max(PIECE // span, 1)
    for group in range(0, -(-source.raw.size // span), step):
        groups = slice(group, group + step)
        blocks = slice(groups.start * BLOCKS_PER_GROUP, groups.stop * BLOCKS_PER_GROUP)
        yield slice(groups.start * span, groups.stop * span), blocks, groups


def _nf4_piece(
    fmt: NF4, source: Source, parts: Parts, shared: Shared, values: slice, blocks: slice, groups: slice
) -> Work:
    from surogate_quantize.kernels.nf4 import quantize_nf4
    from surogate_quantize.kernels.nf4_absmax import DOUBLE_QUANT

    codes = parts["codes"].reshape(-1)[values.start // 2 : -(-values.stop // 2)]
    absmax, no_bytes, no_floats = parts["absmax"][blocks], np.empty(0, np.uint8), np.empty(0, np.float32)
    if fmt.double_quant == "affine":
        outputs = absmax, no_floats, parts["absmax_scale"][groups], parts["absmax_offset"][groups]
    elif fmt.double_quant == "dynamic":
        outputs = absmax, no_floats, parts["nested_absmax"][groups], parts["nested_offset"]
    else:
        outputs = no_bytes, absmax, no_floats, no_floats
    what = (source.raw.reshape(-1)[values], source.kind, source.mask, fmt.block_size, DOUBLE_QUANT[fmt.double_quant])
    work = _bound(quantize_nf4, *what, shared.search, shared.unit, codes, *outputs)
    if not shared.search:
        return work
    from surogate_quantize.kernels.nf4_search import search_nf4

    return _after(lambda: search_nf4(*what, *outputs), work)


def _nvfp4(fmt: NVFP4, source: Source, parts: Parts, shared: Shared) -> Iterator[Work]:
    g = fmt.divisor(shared.amax)
    parts["global_scale"][:] = fmt.stored_global_scale(g)
    if fmt.two_d:
        raw, codes, scale = source.raw, parts["codes"], parts["scale"].view(np.uint8)
        for rows in _bands(raw.shape, BLOCK):
            yield _nvfp4_piece(fmt, source, raw[rows], g, shared, codes[rows], scale[rows])
        return
    raw, codes, scale = _one_row(source.raw), _one_row(parts["codes"]), _one_row(parts["scale"].view(np.uint8))
    step = max(PIECE // BLOCK, 1) * BLOCK
    for start in range(0, raw.size, step):
        end = start + step
        outputs = (codes[:, start // 2 : end // 2], scale[:, start // BLOCK : end // BLOCK])
        yield _nvfp4_piece(fmt, source, raw[:, start:end], g, shared, *outputs)


def _nvfp4_piece(
    fmt: NVFP4,
    source: Source,
    raw: NDArray[Any],
    g: np.float32,
    shared: Shared,
    codes: NDArray[np.uint8],
    scale: NDArray[np.uint8],
) -> Work:
    from surogate_quantize.kernels.nvfp4 import METRICS, quantize_nvfp4

    what = (raw, source.kind, source.mask, BLOCK if fmt.two_d else 1, g)
    choice = (fmt.four_over_six, METRICS[fmt.metric], shared.search, shared.unit)
    work = _bound(quantize_nvfp4, *what, *choice, codes, scale)
    if not shared.search:
        return work
    from surogate_quantize.kernels.nvfp4_search import search_nvfp4

    return _after(lambda: search_nvfp4(*what, scale), work)


def _fp8(fmt: FP8, source: Source, parts: Parts, shared: Shared) -> Iterator[Work]:
    from surogate_quantize.kernels.fp8 import quantize_fp8

    codes = parts["codes"].view(np.uint8)
    if fmt.scaling == "tensor":
        parts["scale"][:] = scale = fmt.scales(np.array([shared.amax], np.float32))
        raw, codes = _one_row(source.raw), _one_row(codes)
        for start in range(0, raw.size, PIECE):
            piece = slice(start, start + PIECE)
            what = (source.kind, scale[None], 1, PIECE, shared.unit)
            yield _bound(quantize_fp8, raw[:, piece], *what, codes[:, piece])
        return
    tile = (TILE, TILE) if fmt.scaling == "block" else (1, source.raw.shape[1])
    for band in _bands(source.raw.shape, tile[0]):
        scale = parts["scale"][band.start // tile[0] : -(-band.stop // tile[0])]
        yield _bound(_fp8_tiles, fmt, source, source.raw[band], tile, shared, codes[band], scale)


def _fp8_tiles(
    fmt: FP8,
    source: Source,
    raw: NDArray[Any],
    tile: tuple[int, int],
    shared: Shared,
    codes: NDArray[np.uint8],
    stored: NDArray[Any],
) -> Sums:
    """A band of whole tiles [height, width], which finds its own scales."""
    from surogate_quantize.kernels.fp8 import quantize_fp8, tile_amax_bits

    bits = np.zeros(stored.shape, raw.dtype)
    tile_amax_bits(raw, *tile, source.mask, bits)
    amax = source.magnitudes(bits)
    scale = fmt.scales(amax)
    if shared.search:
        from surogate_quantize.kernels.fp8_search import search_channels, search_tiles

        tried = fmt.scales(amax, FP8_MULTIPLIERS[:, None, None])
        if fmt.scaling == "block":
            search_tiles(raw, source.kind, tried, scale)
        else:
            search_channels(raw, source.kind, tried[..., 0], scale[:, 0])
    stored[:] = scale
    # A single band of tiles may be so wide that the squares of all its values don't fit 63 bits.
    rows = raw.shape[0] if len(stored) > 1 else max(2 * PIECE // max(raw.shape[1], 1), 1)
    sums: list[Sums] = [
        quantize_fp8(raw[top : top + rows], source.kind, scale, *tile, shared.unit, codes[top : top + rows])
        for top in range(0, raw.shape[0], rows)
    ]
    return sum(error for error, _, _ in sums), sum(square for _, square, _ in sums), max(worst for *_, worst in sums)


def _one_row(array: NDArray[Any]) -> NDArray[Any]:
    """[1, n]: where tiles are one row high, the row's end means nothing."""
    return array.reshape(1, -1)


def _bands(shape: tuple[int, ...], multiple: int) -> Iterator[slice]:
    rows, columns = shape
    step = max(PIECE // max(columns, 1) // multiple, 1) * multiple
    for top in range(0, rows, step):
        yield slice(top, min(top + step, rows))


def _bound(function: Callable[..., Sums], *arguments: Any) -> Work:
    return lambda: function(*arguments)


def _after(first: Callable[[], None], work: Work) -> Work:
    def both() -> Sums:
        first()
        return work()

    return both


def _at_once(pieces: Callable[..., Iterator[Work]]) -> Callable[..., Stages]:
    return lambda *arguments: iter([list(pieces(*arguments))])


CUTTERS: dict[str, Callable[..., Stages]] = {"nf4": _nf4, "fp4": _at_once(_nvfp4), "fp8": _at_once(_fp8)}
"""By format name: what makes the pieces of work that fill the parts of a weight."""
