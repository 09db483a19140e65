"""`--skip`, `--skip-first-layers` and `--skip-last-layers`: what they keep, and what they refuse."""

import pytest

from surogate_formats.errors import UsageError
from surogate_quantize.selection import SkipOptions, select
from surogate_quantize.skip_options import InvalidSkipPatternError, SkipLayersError, UnknownSkipPatternError

SQUARE = (64, 64)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def llama(layers=12):
    tensors = {"model.embed_tokens.weight": ("BF16", (100, 64)), "lm_head.weight": ("BF16", (100, 64))}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        tensors |= {f"{block}.self_attn.{leaf}.weight": ("BF16", SQUARE) for leaf in ATTENTION}
        tensors |= {f"{block}.mlp.{leaf}.weight": ("BF16", SQUARE) for leaf in MLP}
        tensors[f"{block}.input_layernorm.weight"] = ("BF16", (64,))
    return tensors | {"model.norm.weight": ("BF16", (64,))}


def kept(tensors, config=None, **skip):
    decisions = select(tensors, config or {}, SkipOptions(**skip))
    baseline = select(tensors, config or {}, SkipOptions())
    return {name for name in tensors if baseline[name].quantize and not decisions[name].quantize}


def test_skip_first_and_last_layers():
    tensors = llama(12)
    decisions = select(tensors, {"num_hidden_layers": 12}, SkipOptions(first_layers=2, last_layers=1))
    assert decisions["model.layers.0.mlp.up_proj.weight"].reason == "layer 0 of --skip-first-layers 2"
    assert decisions["model.layers.11.mlp.up_proj.weight"].reason == "layer 11 of --skip-last-layers 1"
    assert decisions["model.layers.0.input_layernorm.weight"].reason == "norm"
    quantized = {int(name.split(".")[2]) for name, decision in decisions.items() if decision.quantize}
    assert quantized == set(range(2, 11))


def test_skipped_layers_leave_mtp_heads_out_of_the_count():
    config = {"num_hidden_layers": 11}
    assert {name.split(".")[2] for name in kept(llama(12), config, last_layers=1)} == {"10"}


def test_both_stacks_of_an_encoder_decoder_model_skip_within_their_own_depth():
    names = [f"model.{stack}.layers.{i}.fc1.weight" for stack, n in (("encoder", 4), ("decoder", 2)) for i in range(n)]
    tensors = dict.fromkeys(names, ("F32", SQUARE))
    config = {"encoder_layers": 4, "decoder_layers": 2, "num_hidden_layers": 4}
    assert kept(tensors, config) == set()
    assert kept(tensors, config, last_layers=1) == {
        "model.encoder.layers.3.fc1.weight",
        "model.decoder.layers.1.fc1.weight",
    }


@pytest.mark.parametrize(("first", "last"), [(13, 0), (0, 13), (7, 6), (-1, 0), (0, -1)])
def test_more_layers_than_there_are(first, last):
    with pytest.raises(SkipLayersError, match=r"only 12 layers|must be 0 or more") as caught:
        select(llama(12), {"num_hidden_layers": 12}, SkipOptions(first_layers=first, last_layers=last))
    assert isinstance(caught.value, UsageError)


def test_skipping_every_layer_is_left_to_the_plan():
    decisions = select(llama(12), {}, SkipOptions(first_layers=6, last_layers=6))
    assert not any(decision.quantize for decision in decisions.values())


@pytest.mark.parametrize(
    ("pattern", "layers", "leaves"),
    [
        ("layers.1", {1}, {*ATTENTION, *MLP}),
        ("layers.1.mlp", {1}, set(MLP)),
        ("model.layers.1.mlp.down_proj.weight", {1}, {"down_proj"}),
        ("down_proj", set(range(12)), {"down_proj"}),
        ("o_*", set(range(12)), {"o_proj"}),
        ("layers.*.mlp.down_proj", set(range(12)), {"down_proj"}),
        ("layers.1*.mlp", {1, 10, 11}, set(MLP)),
        ("re:down_proj$", set(range(12)), {"down_proj"}),
        (r"re:^model\.layers\.(0|11)\.", {0, 11}, {*ATTENTION, *MLP}),
    ],
)
def test_patterns(pattern, layers, leaves):
    names = {f"model.layers.{i}.self_attn.{leaf}.weight" for i in layers for leaf in leaves & set(ATTENTION)}
    names |= {f"model.layers.{i}.mlp.{leaf}.weight" for i in layers for leaf in leaves & set(MLP)}
    assert kept(llama(12), patterns=(pattern,)) == names


def test_a_pattern_is_named_as_the_reason_and_never_hides_another():
    decisions = select(llama(2), {}, SkipOptions(patterns=("layers.1", "lm_head")))
    assert decisions["model.layers.1.mlp.down_proj.weight"].reason == "matches --skip layers.1"
    assert decisions["lm_head.weight"].reason == "lm_head"


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("mpl", "did you mean mlp"),
        ("layers.0.self_atn.q_proj", "did you mean self_attn"),
        ("layers.12", "`dry_run`"),
        ("layer", "did you mean layers"),
        ("proj", "`dry_run`|q_proj"),
        ("re:visual", "full module names such as model.embed_tokens"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern, hint):
    with pytest.raises(UnknownSkipPatternError, match=hint) as caught:
        select(llama(12), {}, SkipOptions(patterns=("mlp", pattern)))
    assert isinstance(caught.value, UsageError)
    assert f"`skip` {pattern}: matches no tensor" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["", ".", "layers.", "layers..mlp", "re:(", "re:[a"])
def test_a_pattern_that_cannot_be_read(pattern):
    with pytest.raises(InvalidSkipPatternError) as caught:
        select(llama(2), {}, SkipOptions(patterns=(pattern,)))
    assert isinstance(caught.value, UsageError)


def test_metacharacters_of_regular_expressions_are_plain_in_patterns():
    tensors = {"model.layers.0.mlp+.up.weight": ("F32", SQUARE), "model.layers.0.mlpp.up.weight": ("F32", SQUARE)}
    assert kept(tensors, patterns=("mlp+",)) == {"model.layers.0.mlp+.up.weight"}
