"""Experts with too few tokens of the text: each projection is filled up to its own columns, and they are told."""

from functools import partial

import pytest
import torch
from torch.nn.functional import linear

from surogate_quantize.calibration.expert_pass import BlockExperts, ExpertPass
from surogate_quantize.calibration.solver import damp
from surogate_quantize.calibration.weight_pass import SolvedBlock

TOKENS, HIDDEN, INNER = 32, 12, 6

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

ROLES = ("gate_proj", "up_proj", "down_proj")


class Kept:
    """Inputs in memory, as `KeptInputs` reads them."""

    def __init__(self, batches):
        self._batches, self.count = batches, len(batches)

    def read(self, index):
        return self._batches[index]


class Experts:
    """Two experts of numbers at random."""

    roles, count = ROLES, 2

    def __init__(self, hidden, inner):
        random = torch.Generator().manual_seed(3)
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        self._weights = [[torch.randn(shape, generator=random) for shape in shapes] for _ in range(self.count)]

    def weights(self, number):
        return self._weights[number]

    def inner(self, number, x, gate, up):
        return linear(x, gate).relu() * linear(x, up)


class Weights:
    """A `WeightPass` that keeps weights as they are, and what was known of their inputs."""

    def __init__(self):
        self.seen = {}

    def rounded(self, name):
        return name

    def calibrate(self, name, one, inputs, found):
        self.seen[name] = inputs.hessian.clone()
        number, role = name.split(".")[1:]
        return self.module.weights(int(number))[ROLES.index(role)]


def batches():
    """[batches, tokens, HIDDEN], of which the last is held out."""
    return torch.randn(3, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


def choices(tokens):
    """Experts of each batch's tokens: number 0 gets so many in the first two batches, 1 all others."""
    routed = torch.ones(3, TOKENS, 1, dtype=torch.int64)
    routed[0, : tokens // 2] = 0
    routed[1, : tokens - tokens // 2] = 0
    return list(routed)


def solved(tokens, hidden=HIDDEN, inner=INNER, planned=ROLES):
    """What was found, and the hessians of the weights by name."""
    module, weights, found = Experts(hidden, inner), Weights(), SolvedBlock()
    weights.module = module
    names = frozenset(f"experts.{number}.{role}" for number in range(2) for role in planned)
    kept = Kept(batches()[..., :hidden])
    experts = BlockExperts("experts", module, names)
    ExpertPass(experts, weights, [], kept, kept, choices(tokens), found).solve()
    return found, weights.seen, module


def mean_products(own, everyone, columns):
    """float64 [K, K]: of an expert's own tokens, and of all for those that are missing to `columns`."""
    missing = max(columns - len(own), 0)
    total = (own.T @ own).double() + missing / len(everyone) * (everyone.T @ everyone).double()
    return damp(total / max(columns, len(own)))


@pytest.mark.parametrize(
    ("hidden", "inner", "starved"), [(12, 6, "experts.0.gate_proj/up_proj"), (6, 12, "experts.0.down_proj")]
)
def test_each_projection_is_filled_up_to_its_own_columns(hidden, inner, starved):
    found, seen, module = solved(9, hidden, inner)
    training = batches()[:2, :, :hidden]
    own = torch.cat([x[(choice == 0)[:, 0]] for x, choice in zip(training, choices(9), strict=False)])
    everyone = training.flatten(0, 1)
    gate, up, _ = module.weights(0)
    close(seen["experts.0.up_proj"], mean_products(own, everyone, hidden))
    within, all_within = (module.inner(0, x, gate, up) for x in (own, everyone))
    close(seen["experts.0.down_proj"], mean_products(within, all_within, inner))
    assert found.starved == {starved: 9}


@pytest.mark.parametrize(
    ("tokens", "planned", "starved"),
    [
        (4, ROLES, {"experts.0": 4}),
        (0, ROLES, {"experts.0": 0}),
        (9, ("gate_proj", "up_proj"), {"experts.0": 9}),
        (9, ("up_proj", "down_proj"), {"experts.0.up_proj": 9}),
        (9, ("down_proj",), {}),
        (12, ROLES, {}),
    ],
)
def test_starved_experts_are_told_by_what_is_quantized_of_them(tokens, planned, starved):
    assert solved(tokens, planned=planned)[0].starved == starved
