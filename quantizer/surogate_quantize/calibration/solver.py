"""The solver: codes and scales of a weight that keep its output on calibration text, whatever the format.

GPTQ (arXiv:2210.17323) in the order of descending diagonal, then coordinate descent on codes and scales, against a
target that undoes the error of the layers before it. It minimises tr((Q - W') H (Q - W')^T).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from surogate_quantize.calibration.grid import Blocks, Grid, rounded
from surogate_quantize.calibration.replayed import Replayed

CHUNK = 128
"""Columns that are rounded one by one before the rest is corrected by one matrix product."""

DAMPING = 0.01
"""Of the mean of the diagonal, added to it."""

SWEEPS = 3
"""Of coordinate descent."""

SHIFT_ROWS = 1024
"""Rows of the shift that are found at a time: its products in float64 are as large as the matrix."""


@dataclass(frozen=True)
class Solved:
    """What was found for a weight [N, K].

    Attributes:
        values: of the codes, float32 [N, K].
        scales: legal ones, float32 [`Blocks.count`].
    """

    values: Tensor
    scales: Tensor

    def dequantized(self, grid: Grid) -> Tensor:
        """The weight as readers see it, float32 [N, K]."""
        return self.values * grid.blocks.expand(self.scales)


@dataclass(frozen=True)
class Statistics:
    """What the inputs of a linear on calibration text say about its weight.

    Attributes:
        hessian: float64 [K, K], the damped mean of x x^T over the inputs x that the quantized model gives it.
        order: int64 [K], columns by descending diagonal.
        upper: float32 [K, K], U with hessian^-1 = U^T U in that order.
        shift: float32 [K, K] or None; W + W shift gives these inputs what W gives the original model's.
    """

    hessian: Tensor
    order: Tensor
    upper: Tensor
    shift: Tensor | None


def statistics(products: Tensor, cross: Tensor | None = None, damping: float = DAMPING) -> Statistics:
    """Prepares the statistics of a linear.

    Args:
        products: float64 [K, K], the mean of x x^T.
        cross: float64 [K, K], the mean of (x' - x) x^T, x' being the original model's inputs; None: the target is the
            weight itself.
        damping: see `damp`.
    """
    return prepared(damp(products.double().clone(), damping), cross)


def damp(products: Tensor, damping: float = DAMPING) -> Tensor:
    """Adds a share of the mean of the diagonal of float64 [K, K] to that diagonal, in place; returns the matrix."""
    mean = products.diagonal().mean()
    products.diagonal().add_(damping * mean if mean > 0 else 1)
    return products


def prepared(hessian: Tensor, cross: Tensor | None) -> Statistics:
    """The statistics of a damped `hessian`, float64 [K, K], which is kept; see `statistics`."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_root(hessian, order)
    shift = None
    if cross is not None:
        shift = torch.empty_like(cross, dtype=torch.float32)
        for start in range(0, len(cross), SHIFT_ROWS):
            rows = slice(start, start + SHIFT_ROWS)
            shift[rows, order] = (cross[rows, order].double() @ upper.T @ upper).float()
    return Statistics(hessian, order, upper.float().contiguous(), shift)


def _inverse_root(hessian: Tensor, order: Tensor) -> Tensor:
    """U, upper, float64 [K, K], with hessian^-1 = U^T U in an order; three matrices in memory at most."""
    backwards = order.flip(0)
    lower = torch.linalg.cholesky(hessian[backwards.unsqueeze(1), backwards])
    inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device).T  # column-major: LAPACK's, solved in place
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1)


def solve(target: Tensor, grid: Grid, known: Statistics, sweeps: int = SWEEPS) -> Solved:
    """Finds codes and scales.

    Args:
        target: float32 [N, K], the weight, or what makes up for the layers before it, too.
        grid: its legal values.
        known: of its inputs.
        sweeps: of coordinate descent after GPTQ.
    """
    scales = search_scales(target, grid, 1 / known.upper.diagonal()[known.order.argsort()] ** 2)
    values = _gptq(target, grid, scales, known)
    hessian, descend = known.hessian.float(), Replayed(partial(_descend_codes, grid))
    for _ in range(sweeps):
        values, scales = _sweep(target, grid, values, scales, hessian, descend)
    return Solved(values, scales)


def search_scales(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """The legal scales with the least squared error of rounding to nearest in each block.

    Args:
        weight: float32 [N, K].
        grid: its legal values.
        importance: float32 [K], of the columns; None: all alike.
    """
    best, least = grid.scales, None
    for multiplier in (1.0, *grid.multipliers):
        scales = grid.legal(grid.scales * multiplier)
        expanded = grid.blocks.expand(scales)
        error = (rounded(grid, weight, expanded) * expanded - weight).square_()
        loss = grid.blocks.sums(error if importance is None else error * importance)
        if least is None:
            best, least = scales, loss
        better = loss < least
        best, least = torch.where(better, scales, best), torch.where(better, loss, least)
    return best


def _gptq(target: Tensor, grid: Grid, scales: Tensor, known: Statistics) -> Tensor:
    """The values of codes, float32 [N, K]: each column takes over the weighted errors of those before it."""
    order, upper = known.order, known.upper
    left, scale = target[:, order].contiguous(), grid.blocks.expand(scales)[:, order].contiguous()
    values = torch.empty_like(left)
    count = left.shape[1]
    rounding = Replayed(partial(_rounded_chunk, grid))
    for start in range(0, count, CHUNK):
        here, after = slice(start, min(start + CHUNK, count)), slice(min(start + CHUNK, count), count)
        found, errors = rounding(left[:, here].T, scale[:, here].T, upper[here, here])
        values[:, here] = found.T
        left[:, after].addmm_(errors.T, upper[here, after], alpha=-1)
    return values[:, order.argsort()]


def _rounded_chunk(grid: Grid, left: Tensor, scale: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Values of codes and weighted errors, float32 [columns, N] both, of columns that take over each other's errors."""
    chunk, scale = left.clone(memory_format=torch.contiguous_format), scale.contiguous()
    values, errors = torch.empty_like(chunk), torch.empty_like(chunk)
    for column in range(len(chunk)):
        here = scale[column]
        found = rounded(grid, chunk[column], here)
        values[column] = found
        errors[column] = (chunk[column] - found * here) / upper[column, column]
        chunk[column + 1 :].addr_(upper[column, column + 1 :], errors[column], alpha=-1)
    return values, errors


def _sweep(
    target: Tensor, grid: Grid, values: Tensor, scales: Tensor, hessian: Tensor, descend: Replayed
) -> tuple[Tensor, Tensor]:
    """One pass of coordinate descent over all columns: in each chunk first the scales of its blocks, then its codes."""
    blocks, values, scales = grid.blocks, values.clone(), scales.clone()
    scale = blocks.expand(scales).contiguous()
    gradient = (values * scale - target) @ hessian
    if blocks.width > CHUNK and blocks.height:
        scales = _improved(grid, values, scales, gradient, values @ hessian, slice(None))
        moved = blocks.expand(scales).contiguous()
        gradient += (values * (moved - scale)) @ hessian
        scale = moved
    for start in range(0, target.shape[1], CHUNK):
        columns = slice(start, min(start + CHUNK, target.shape[1]))
        old = values[:, columns] * scale[:, columns]
        local = gradient[:, columns].contiguous()
        if blocks.width <= CHUNK and blocks.height:
            _descend_scales(grid, values, scales, scale, local, hessian, columns)
        (found,) = descend(values[:, columns].T, scale[:, columns].T, local.T, hessian[columns, columns])
        values[:, columns] = found.T
        moved = values[:, columns] * scale[:, columns] - old
        gradient[:, columns.stop :] += moved @ hessian[columns, columns.stop :]
    return values, scales


def _descend_scales(
    grid: Grid, values: Tensor, scales: Tensor, scale: Tensor, local: Tensor, hessian: Tensor, columns: slice
) -> None:
    """Moves the scales of a chunk's blocks one after the other, and its gradient with them, all in place."""
    width = grid.blocks.width
    for start in range(columns.start, columns.stop, width):
        block = slice(start, min(start + width, columns.stop))
        inside = slice(block.start - columns.start, block.stop - columns.start)
        place, here = slice(start // width, start // width + 1), values[:, block]
        narrow = here @ hessian[block, block]
        scales[:, place] = _improved(grid, here, scales[:, place], local[:, inside], narrow, place)
        moved = scales[:, place].repeat_interleave(grid.blocks.height, 0)[: len(here)]
        local += (here * (moved - scale[:, block])) @ hessian[block, columns]
        scale[:, block] = moved


def _improved(grid: Grid, values: Tensor, scales: Tensor, gradient: Tensor, products: Tensor, place: slice) -> Tensor:
    """Legal scales nearest to the best for these codes: s - v^T g / (v^T H v); `products` are v H."""
    blocks = Blocks((values.shape[0], values.shape[1]), grid.blocks.height, grid.blocks.width)
    curvature = blocks.sums(values * products)
    step = blocks.sums(values * gradient) / torch.where(curvature > 0, curvature, 1)
    return grid.legal(scales - torch.where(curvature > 0, step, 0), place)


def _descend_codes(grid: Grid, values: Tensor, scale: Tensor, gradient: Tensor, inner: Tensor) -> tuple[Tensor]:
    """The codes of columns moved one after the other, float32 [columns, N], as all but `inner` are."""
    across, moved = (each.clone(memory_format=torch.contiguous_format) for each in (gradient, values))
    scale = scale.contiguous()
    for column in range(len(moved)):
        here = scale[column]
        before = moved[column] * here
        found = rounded(grid, before - across[column] / inner[column, column], here)
        across.addr_(inner[column], found * here - before)
        moved[column] = found
    return (moved,)
