"""The calibrated pass over the experts of a block: each is solved for the tokens that the original gives to it.

The experts of a quantized stream are given the same tokens, so that what an expert sees there can be compared with what
it sees in the original; a router's choice for them may differ by little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from surogate_quantize.calibration.block_experts import BlockExperts, experts_at_once
from surogate_quantize.calibration.inputs import Inputs, Sums, choosing_tokens
from surogate_quantize.calibration.originals import KeptInputs
from surogate_quantize.calibration.streams import Follower
from surogate_quantize.calibration.weight_pass import SolvedBlock, WeightPass


class ExpertPass:
    """Solves the experts of one block.

    Args:
        experts: of the block, with their original weights.
        weights: solves weights.
        followers: the stream that codes are solved in, and others that then take the same weights.
        original: what the experts are given in the original, [tokens, hidden].
        followed: what they are given in the first of the followers.
        choices: int64 [tokens, k] of each batch, the experts that the original's router chooses.
        rows: of text in a batch.
        found: what is known of the block.
    """

    def __init__(
        self,
        experts: BlockExperts,
        weights: WeightPass,
        followers: list[Follower],
        original: KeptInputs,
        followed: KeptInputs,
        choices: list[Tensor],
        rows: int,
        found: SolvedBlock,
    ) -> None:
        """Solves nothing yet."""
        self._experts, self._weights, self._followers = experts, weights, followers
        self._original, self._followed, self._choices, self._found = original, followed, choices, found
        self._rows = rows
        module = experts.module
        self._dense = {
            name: weight.data
            for number in range(module.count)
            for name, weight in zip(experts.names(number), module.weights(number), strict=True)
        }

    def solve(self) -> None:
        """Finds the codes of all experts."""
        gate, _, down = self._experts.names(0)
        at_once = experts_at_once(self._columns(gate), self._columns(down))
        for first in range(0, self._experts.module.count, at_once):
            numbers = list(range(first, min(first + at_once, self._experts.module.count)))
            values: dict[str, Tensor] = {}
            self._calibrate(slice(2), self._inputs(numbers, {}), values)
            self._calibrate(slice(2, 3), self._inputs(numbers, values, inner=True), values)
            for number in numbers:
                self._tell_starved(number)

    def _calibrate(self, roles: slice, known: dict[int, Inputs], values: dict[str, Tensor]) -> None:
        """Takes inputs out of `known` one by one: what the solver makes of them is as large as they are."""
        for number in list(known):
            inputs = known.pop(number)
            for name in self._experts.names(number)[roles]:
                if name in self._experts.planned:
                    values[name] = self._weights.calibrate(name, self._weights.rounded(name), inputs, self._found)
                    for follower in self._followers:
                        follower.take(name, values[name])

    def _inputs(self, numbers: list[int], values: Mapping[str, Tensor], *, inner: bool = False) -> dict[int, Inputs]:
        """What gate and up are given, or with `inner` what down is, by the number of the expert."""
        role = 2 if inner else 0
        sums = {number: Sums(self._experts.names(number)[role]) for number in numbers}
        few = [number for number in numbers if self._starved(number, self._experts.names(number)[role])]
        everyone = {number: Sums(self._experts.names(number)[role]) for number in few} if inner else {}
        for position, (x, wanted, held_out) in enumerate(self._batches()):
            for number in numbers:
                own = (self._choices[position] == number).any(-1).nonzero()[:, 0]
                own, choosing = self._held_out(own, len(x)) if held_out else (own, 0)
                pair = self._seen(number, x[own], wanted[own], values, inner)
                if held_out:
                    sums[number].hold_out(*pair, choosing=choosing)
                    continue
                sums[number].add(*pair)
                if number in everyone:
                    everyone[number].add(*self._seen(number, x, wanted, values, inner))
        for number in few:
            others = everyone.pop(number) if inner else self._everyone
            sums[number].fill(others, self._columns(self._experts.names(number)[role]))
        return {number: each.inputs() for number, each in sums.items()}

    def _held_out(self, own: Tensor, tokens: int) -> tuple[Tensor, int]:
        """Of an expert's tokens in the last batch, those that choose and then the others; how many choose.

        All tokens stand in for those that choose, or those that are reported on, where the expert has none of them.
        """
        choosing = choosing_tokens(tokens, self._rows)
        parts = ((own[own < choosing], 0, choosing), (own[own >= choosing], choosing, tokens))
        first, other = (part if len(part) else torch.arange(*ends, device=own.device) for part, *ends in parts)
        return torch.cat([first, other]), len(first)

    @cached_property
    def _everyone(self) -> Sums:
        """What all tokens are to gate and up, whatever the expert: summed up once a block, and not for each of many."""
        sums = Sums(self._experts.name)
        for x, wanted, held_out in self._batches():
            if not held_out:
                sums.add(x, wanted)
        return sums

    def _seen(
        self, number: int, x: Tensor, wanted: Tensor, values: Mapping[str, Tensor], inner: bool
    ) -> tuple[Tensor, Tensor]:
        if not inner:
            return x, wanted
        gate, up, _ = self._experts.names(number)
        module, dense = self._experts.module, self._dense
        quantized = module.inner(number, x, values.get(gate, dense[gate]), values.get(up, dense[up]))
        return quantized, module.inner(number, wanted, dense[gate], dense[up])

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, bool]]:
        count = self._original.count
        for position in range(count):
            held_out = position == count - 1
            yield self._followed.read(position).flatten(0, -2), self._original.read(position).flatten(0, -2), held_out

    def _columns(self, name: str) -> int:
        return self._dense[name].shape[1]

    def _starved(self, number: int, name: str) -> bool:
        """Whether the text gives an expert fewer tokens than one of its weights has columns."""
        return self._tokens(number) < self._columns(name)

    def _tell_starved(self, number: int) -> None:
        """One entry for an expert, as they are counted; it names projections where only some of them are starved."""
        planned = [name for name in self._experts.names(number) if name in self._experts.planned]
        few = [name for name in planned if self._starved(number, name)]
        if few:
            some = "" if few == planned else "." + "/".join(name.rpartition(".")[2] for name in few)
            self._found.starved[f"{self._experts.name}.{number}{some}"] = self._tokens(number)

    def _tokens(self, number: int) -> int:
        """How many the original gives to an expert, the batch that is held out not counted."""
        counted = self._choices[:-1] or self._choices
        return sum(int((choice == number).any(-1).sum()) for choice in counted)
