"""What the linears of a stage are given on calibration text: sums for the solver, and rows that are held out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from surogate_formats.errors import SurogateError
from surogate_quantize.calibration.originals import OriginalInputs
from surogate_quantize.calibration.solver import Statistics, damp, prepared

Pair = tuple[Tensor, Tensor]
"""What a stream gives to a linear, float32 [tokens, K], and what the original gives to it."""


class NotFiniteError(SurogateError):
    """The model's own activations hold a NaN or an infinity in float32."""


class Inputs:
    """What the linears of a stage are given, all batches but the last, which is held out.

    Its rows choose between targets, all but its last one, on which errors are measured, and nothing else.

    Args:
        hessian: float64 [K, K], the damped mean of x x^T.
        cross: float64 [K, K], the mean of (x' - x) x^T, x' being the original's inputs; None where those are x.
        reported: of the row that errors are measured on.
        choosing: of the rows that choose; None where one row alone is held out.

    Attributes:
        hessian: as given; all that an adapter asks for.
    """

    def __init__(self, hessian: Tensor, cross: Tensor | None, reported: Pair, choosing: Pair | None) -> None:
        """Solves nothing yet."""
        self.hessian, self._cross, self._reported, self._choosing = hessian, cross, reported, choosing

    @cached_property
    def known(self) -> Statistics:
        """What the solver asks for."""
        return prepared(self.hessian, self._cross)

    def target(self, weight: Tensor) -> Tensor:
        """W + a W shift, float32 [N, K], with the share a of 0 to 1 that serves the rows best that choose.

        The whole shift fits the text that it was found on, and other text worse.
        """
        if self._cross is None:
            return weight
        assert self.known.shift is not None
        shift = weight @ self.known.shift
        return weight + self._share(weight, shift) * shift

    def _share(self, weight: Tensor, shift: Tensor) -> float:
        """0 where no rows choose: those that the shift was found on would always have the whole of it."""
        if self._choosing is None:
            return 0.0
        x, wanted = self._choosing
        moved, missing = x @ shift.T, (wanted - x) @ weight.T
        size = float((moved * moved).sum())
        return min(max(float((moved * missing).sum()) / size, 0.0), 1.0) if size else 0.0

    def error(self, weight: Tensor, values: Tensor) -> float:
        """||Q x - W x'|| / ||W x'|| over the row that is reported on, x' being the original model's inputs."""
        x, wanted = self._reported
        expected = wanted @ weight.T
        size = float(expected.norm())
        return float((x @ values.T - expected).norm()) / size if size else 0.0


class Sums:
    """What is known of the inputs of one stage, batch after batch.

    Args:
        leader: the linear that is named where they are not finite.

    Attributes:
        tokens: how many there were.
    """

    def __init__(self, leader: str) -> None:
        """None yet."""
        self.tokens = 0
        self._leader = leader
        self._products: Tensor | None = None
        self._cross: Tensor | None = None
        self._reported: Pair | None = None
        self._choosing: Pair | None = None

    def add(self, x: Tensor, wanted: Tensor) -> None:
        """A stream's, float32 [tokens, K], and the original's, the same tensor where they are that."""
        self._products = _added(self._products, x.T @ x)
        if wanted is not x:
            self._cross = _added(self._cross, (wanted - x).T @ x)
        self.tokens += len(x)

    def hold_out(self, x: Tensor, wanted: Tensor, choosing: int = 0) -> None:
        """As `add`, of the batch that is held out; its first so many tokens choose, all others are reported on."""
        self._choosing = (x[:choosing], wanted[:choosing]) if choosing else None
        self._reported = x[choosing:], wanted[choosing:]

    def fill(self, others: Sums, floor: int) -> None:
        """Makes up for tokens that are missing to a number by so many times the mean of others."""
        share = (floor - self.tokens) / others.tokens
        if share > 0:
            assert others._products is not None
            self._products = _added(self._products, others._products * share)
            if others._cross is not None:
                self._cross = _added(self._cross, others._cross * share)
            self.tokens = floor

    def inputs(self) -> Inputs:
        """What they say; `NotFiniteError` where they are not finite. Takes the sums over."""
        products, cross, reported = self._products, self._cross, self._reported
        assert products is not None
        assert reported is not None
        known = (products, cross, *reported, *(self._choosing or ()))
        if not all(torch.isfinite(values).all() for values in known if values is not None):
            raise NotFiniteError(
                f"{self._leader}: its inputs on the calibration text are not finite; use `codes='search'`"
            )
        cross = None if cross is None else cross.div_(self.tokens)
        return Inputs(damp(products.div_(self.tokens)), cross, reported, self._choosing)


def choosing_tokens(tokens: int, rows: int) -> int:
    """How many of a held-out batch's tokens choose: all but its last row's.

    A share that fewer rows choose is farther from what serves other text; an error is held against that of nearest
    codes on the same row, and needs no more.
    """
    return tokens // rows * (rows - 1)


def summed(leader: str, pairs: Iterable[Pair], count: int, rows: int = 1) -> Inputs:
    """The inputs of `count` batches, each as `Sums.add` takes it; the last is held out, if there are two or more.

    Args:
        leader: see `Sums`.
        pairs: the batches.
        count: of them.
        rows: of text in a batch; 1 where nothing is to be chosen.

    Raises:
        NotFiniteError: see the class.
    """
    sums = Sums(leader)
    for position, pair in enumerate(pairs):
        sums.hold_out(*pair, choosing=choosing_tokens(len(pair[0]), rows))
        if position and position == count - 1:
            break
        sums.add(*pair)
    return sums.inputs()


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    """A sum in float64, in place but for its first term."""
    return more.double() if total is None else total.add_(more)


def original_inputs(leader: str, original: OriginalInputs) -> Inputs:
    """What a stage is given by the original model."""
    batches = (original.read(index).flatten(0, -2) for index in range(original.count))
    return summed(leader, ((x, x) for x in batches), original.count)
