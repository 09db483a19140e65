"""What the linears of a stage are given on calibration text: sums for the solver, and a batch that is held out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from surogate_formats.errors import SurogateError
from surogate_quantize.calibration.originals import OriginalInputs
from surogate_quantize.calibration.solver import Statistics, damp, prepared


class NotFiniteError(SurogateError):
    """The model's own activations hold a NaN or an infinity in float32."""


class Inputs:
    """What the linears of a stage are given, all batches but the last, which is held out.

    Args:
        hessian: float64 [K, K], the damped mean of x x^T.
        cross: float64 [K, K], the mean of (x' - x) x^T, x' being the original's inputs; None where those are x.
        x: of the held-out batch, float32 [tokens, K].
        wanted: the original's there.

    Attributes:
        hessian: as given; all that an adapter asks for.
    """

    def __init__(self, hessian: Tensor, cross: Tensor | None, x: Tensor, wanted: Tensor) -> None:
        """Solves nothing yet."""
        self.hessian, self._cross, self._x, self._wanted = hessian, cross, x, wanted

    @cached_property
    def known(self) -> Statistics:
        """What the solver asks for."""
        return prepared(self.hessian, self._cross)

    def target(self, weight: Tensor) -> Tensor:
        """W + a W shift, float32 [N, K], with the share a of 0 to 1 that serves the held-out batch best.

        The whole shift fits the text that it was found on, and other text worse.
        """
        if self._cross is None:
            return weight
        assert self.known.shift is not None
        shift = weight @ self.known.shift
        moved, missing = self._x @ shift.T, (self._wanted - self._x) @ weight.T
        size = float((moved * moved).sum())
        share = float((moved * missing).sum()) / size if size else 0.0
        return weight + min(max(share, 0.0), 1.0) * shift

    def error(self, weight: Tensor, values: Tensor) -> float:
        """||Q x - W x'|| / ||W x'|| over the held-out batch, x' being the original model's inputs."""
        expected = self._wanted @ weight.T
        size = float(expected.norm())
        return float((self._x @ values.T - expected).norm()) / size if size else 0.0


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
        self._held: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, wanted: Tensor) -> None:
        """A stream's, float32 [tokens, K], and the original's, the same tensor where they are that."""
        self._products = _added(self._products, x.T @ x)
        if wanted is not x:
            self._cross = _added(self._cross, (wanted - x).T @ x)
        self.tokens += len(x)

    def hold_out(self, x: Tensor, wanted: Tensor) -> None:
        """As `add`, of the batch that is held out."""
        self._held = x, wanted

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
        products, cross, held = self._products, self._cross, self._held
        assert products is not None
        assert held is not None
        if not all(torch.isfinite(values).all() for values in (products, cross, *held) if values is not None):
            raise NotFiniteError(
                f"{self._leader}: its inputs on the calibration text are not finite; use `codes='search'`"
            )
        return Inputs(damp(products.div_(self.tokens)), None if cross is None else cross.div_(self.tokens), *held)


def summed(leader: str, pairs: Iterable[tuple[Tensor, Tensor]], count: int) -> Inputs:
    """The inputs of `count` batches, each as `Sums.add` takes it; the last is held out, if there are two or more.

    Raises:
        NotFiniteError: see the class.
    """
    sums = Sums(leader)
    for position, pair in enumerate(pairs):
        sums.hold_out(*pair)
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
