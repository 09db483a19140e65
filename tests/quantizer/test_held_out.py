"""Rows that are held out: some choose the share of the asymmetric target, and errors are measured on others alone."""

import json

import pytest
import torch
from quantizer.test_starved_experts import ROLES, TOKENS, Experts, Kept, batches, choices

from surogate_quantize import make_options
from surogate_quantize.calibration.block_experts import BlockExperts
from surogate_quantize.calibration.expert_pass import ExpertPass
from surogate_quantize.calibration.inputs import NotFiniteError, summed
from surogate_quantize.calibration.weight_pass import SolvedBlock
from surogate_quantize.calibration_options import CalibrationOptions
from surogate_quantize.run import dry_run

ROWS, LENGTH, COLUMNS = 3, 10, 8
RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(3, ROWS * LENGTH, COLUMNS, generator=RANDOM)
MOVED = torch.tensor([0.5, 0.5, 0.25]).reshape(3, 1, 1)  # what is held out asks for half of what the others ask for
WANTED = X + MOVED * X + 0.1 * torch.randn(X.shape, generator=RANDOM)
WEIGHT, CODES = torch.randn(2, 5, COLUMNS, generator=RANDOM)


def inputs(rows, change=None):
    """Of three batches; with `change`, of other rows of the last, from there to there."""
    x, wanted = X.clone(), WANTED.clone()
    if change is not None:
        x[2, change] *= 1.1
    return summed("q_proj", list(zip(x, wanted, strict=True)), 3, rows)


@pytest.mark.parametrize(("rows", "choosing"), [(2, 15), (3, 20), (1, 0)])
def test_what_is_reported_on_chooses_nothing_and_what_chooses_is_not_reported(rows, choosing):
    found = inputs(rows)
    reported = inputs(rows, slice(choosing, None))
    assert torch.equal(reported.target(WEIGHT), found.target(WEIGHT))
    assert reported.error(WEIGHT, CODES) != found.error(WEIGHT, CODES)
    if choosing:
        chose = inputs(rows, slice(choosing))
        assert not torch.equal(chose.target(WEIGHT), found.target(WEIGHT))
        assert chose.error(WEIGHT, CODES) == found.error(WEIGHT, CODES)


def test_the_share_is_the_best_on_the_rows_that_choose():
    found = inputs(ROWS)
    x, wanted = X[2, :-LENGTH], WANTED[2, :-LENGTH] @ WEIGHT.T
    target = found.target(WEIGHT)
    least = (x @ target.T - wanted).norm()
    assert 0.2 < (target - WEIGHT).norm() / (WEIGHT @ found.known.shift).norm() < 0.8
    for share in (-0.1, 0.1):
        other = target + share * (target - WEIGHT)
        assert (x @ other.T - wanted).norm() > least


def test_where_one_row_is_held_out_nothing_is_moved():
    found = inputs(1)
    assert torch.equal(found.target(WEIGHT), WEIGHT)
    assert found.error(WEIGHT, WEIGHT) > 0


@pytest.mark.parametrize("row", [0, 1, 2])
def test_what_is_not_finite_is_named_wherever_it_is_held_out(row):
    x = X.clone()
    x[2, row * LENGTH] = float("nan")
    with pytest.raises(NotFiniteError, match="q_proj"):
        summed("q_proj", list(zip(x, WANTED, strict=True)), 3, ROWS)


class Looking:
    """A `WeightPass` that keeps what is held out for each weight."""

    def __init__(self):
        self.chose, self.reported = {}, {}

    def rounded(self, name):
        return name

    def calibrate(self, name, one, inputs, found):
        self.chose[name], self.reported[name] = (pair and pair[0] for pair in (inputs._choosing, inputs._reported))
        number, role = name.split(".")[1:]
        return Experts(12, 6).weights(int(number))[ROLES.index(role)]


@pytest.mark.parametrize(
    ("own", "chose", "reported"),
    [
        ((1, 3, 20, 30), (1, 3), (20, 30)),
        ((20, 30), range(16), (20, 30)),
        ((1, 3), (1, 3), range(16, 32)),
        ((), range(16), range(16, 32)),
    ],
)
def test_an_expert_is_looked_at_with_its_own_tokens_of_either_rows_or_with_all_of_them(own, chose, reported):
    routed = choices(20)
    routed[2][list(own)] = 0
    kept, looking = Kept(batches()[..., :12]), Looking()
    experts = BlockExperts("experts", Experts(12, 6), frozenset({"experts.0.up_proj"}))
    ExpertPass(experts, looking, [], kept, kept, routed, 2, SolvedBlock()).solve()
    last = batches()[2, :, :12]
    assert torch.equal(looking.chose["experts.0.up_proj"], last[list(chose)])
    assert torch.equal(looking.reported["experts.0.up_proj"], last[list(reported)])
    assert len(last) == TOKENS


@pytest.mark.parametrize(("rows", "taken"), [(3, 3), (4, 4), (7, 6), (20, 8)])
def test_rows_are_even_in_number_from_four_on(tiny, tmp_path, rows, taken):
    text = tmp_path / "ids.jsonl"
    text.write_text(json.dumps({"input_ids": [5] * (256 * rows)}))
    options = make_options("nf4", {}, codes="calibrated", calibration_text=str(text), calibration_tokens=1000)
    plan, _ = dry_run(tiny("llama"), options, device="cpu")
    assert plan.calibration["calibration_tokens"] == 256 * taken


@pytest.mark.parametrize(
    ("tokens", "widest", "expected"),
    [(None, 64, 28 * 512), (None, 1536, 32 * 512), (None, 12288, 240 * 512), (1000, 1536, 1024), (1025, 64, 1536)],
)
def test_default_tokens_are_whole_batches_and_those_asked_for_whole_rows(tokens, widest, expected):
    assert CalibrationOptions(tokens=tokens).tokens_for(widest) == expected
