"""Experts with too few tokens of the text: each projection is filled up to its own columns, and they are told."""

import json
from functools import partial

import pytest
import torch
from torch.nn.functional import linear

from surogate_quantize import make_options
from surogate_quantize.bands import MemoryBudgetError
from surogate_quantize.calibration import block_experts, calibrate, expert_pass
from surogate_quantize.calibration.block_experts import BlockExperts, experts_at_once, sums_bytes
from surogate_quantize.calibration.estimate import PassSize
from surogate_quantize.calibration.expert_pass import ExpertPass
from surogate_quantize.calibration.inputs import Sums
from surogate_quantize.calibration.solver import damp
from surogate_quantize.calibration.weight_pass import SolvedBlock
from surogate_quantize.run import dry_run

TOKENS, WIDEST = 32, 40

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
    """[batches, tokens, WIDEST], of which the last is held out."""
    return torch.randn(3, TOKENS, WIDEST, generator=torch.Generator().manual_seed(1))


def choices(tokens):
    """Experts of each batch's tokens: number 0 gets so many in the first two batches, 1 all others."""
    routed = torch.ones(3, TOKENS, 1, dtype=torch.int64)
    routed[0, : tokens // 2] = 0
    routed[1, : tokens - tokens // 2] = 0
    return list(routed)


def solved(tokens, hidden=12, inner=6, planned=ROLES):
    """What was found, and the hessians of the weights by name."""
    module, weights, found = Experts(hidden, inner), Weights(), SolvedBlock()
    weights.module = module
    names = frozenset(f"experts.{number}.{role}" for number in range(2) for role in planned)
    kept = Kept(batches()[..., :hidden])
    experts = BlockExperts("experts", module, names)
    ExpertPass(experts, weights, [], kept, kept, choices(tokens), 2, found).solve()
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


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_all_gates_and_ups_share_is_summed_up_once_a_block(monkeypatch, at_once):
    _, expected, _ = solved(30, hidden=WIDEST, inner=8)
    added = []

    class Counted(Sums):
        """Knows when all tokens are added."""

        def add(self, x, wanted):
            if tuple(x.shape) == (TOKENS, WIDEST):
                added.append(len(x))
            super().add(x, wanted)

    monkeypatch.setattr(expert_pass, "Sums", Counted)
    monkeypatch.setattr(block_experts, "SUMS_AT_A_TIME", at_once * 8 * 2 * WIDEST**2)
    found, seen, _ = solved(30, hidden=WIDEST, inner=8)
    assert added == [TOKENS] * 2, "once for each batch that isn't held out"
    assert found.starved == {f"experts.{number}.gate_proj/up_proj": 30 + 4 * number for number in range(2)}
    assert all(torch.equal(seen[name], expected[name]) for name in expected)


def test_nothing_is_summed_up_for_experts_with_tokens_enough(monkeypatch):
    monkeypatch.setattr(ExpertPass, "_everyone", property(lambda _: pytest.fail("all tokens are summed up")))
    assert not solved(12)[0].starved


@pytest.mark.parametrize(
    ("outer", "inner", "at_once"), [(2048, 768, 4), (4096, 14336, 1), (1024, 1024, 8), (64, 32, 4096)]
)
def test_sums_stay_within_their_room_unless_one_experts_alone_do_not(outer, inner, at_once):
    assert experts_at_once(outer, inner) == at_once
    shared = 16 * outer**2
    assert sums_bytes(outer, inner, 10**6) - shared <= max(256 << 20, 32 * inner**2)
    assert sums_bytes(outer, inner, 1) == shared + max(16 * outer**2, 32 * inner**2)


def operations(tokens, solves=1, share=0.25):
    """Of a block of 4 experts of 8 x 32, where each has a share of the tokens."""
    shapes = ((8, 32), (8, 32), (32, 8)) * 4
    size = PassSize(shapes, (share,) * 12, 32, 1, tokens, 64, 2, solves, 0, 0)
    return size.operations


def test_the_estimate_counts_what_stands_in_for_missing_tokens(monkeypatch):
    found = [operations(tokens, solves) for tokens in (28, 32) for solves in (0, 1)]
    monkeypatch.setattr(PassSize, "_of_everyone", 0)
    without = [operations(tokens, solves) for tokens in (28, 32) for solves in (0, 1)]
    shared, downs = 2 * 32**2, 4 * (4 * 8 * 32 + 2 * 8**2)
    assert [a - b for a, b in zip(found, without, strict=True)] == [0, 2 * 28 * (shared + downs), 0, 2 * 32 * shared]


def test_sums_of_experts_count_against_the_budget_where_experts_are_calibrated(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(calibrate, "sums_bytes", lambda *sizes: asked.append(sizes) or 1 << 50)
    text = tmp_path / "ids.jsonl"
    text.write_text(json.dumps({"input_ids": [5] * 1024}))
    settings = {"calibration_text": str(text), "calibration_tokens": 512}
    with pytest.raises(MemoryBudgetError, match=r"calibrating Qwen3MoeForCausalLM takes about"):
        dry_run(tiny("qwen3-moe"), make_options("nf4", {}, codes="calibrated", **settings), device="cpu")
    dry_run(tiny("qwen3-moe"), make_options("nf4", {}, codes="calibrated", skip=["experts"], **settings), device="cpu")
    dry_run(tiny("qwen3-moe"), make_options("nf4", {}, adapter_init=2, **settings), device="cpu")
    config = json.loads((tiny("qwen3-moe") / "config.json").read_text())
    assert asked == [(config["hidden_size"], config["moe_intermediate_size"], 2 * 4)]
