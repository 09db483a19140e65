"""The plan: where every tensor goes, what is listed as kept, who shares an amax, and what is refused."""

import re

import numpy as np
import pytest
from quantizer.checkpoints import CONFIG, LINEARS, llama, write_checkpoint

from surogate_formats.checkpoint import Checkpoint
from surogate_quantize import make_options
from surogate_quantize.plan import AlreadyQuantizedError, NameClashError, NothingToQuantizeError, make_plan
from surogate_quantize.skip_options import SkipLayersError, UnknownSkipPatternError
from surogate_quantize.tied_heads import tied_heads

NAMES = {f"{module}.weight" for module in LINEARS}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plan") / "source")


def plan_of(directory, name="nf4", parameters=None, layout=None, **options):
    with Checkpoint.open(directory) as source:
        return make_plan(source, make_options(name, parameters or {}, layout, **options))


def reasons(made):
    return {tensor.info.name: tensor.decision.reason for tensor in made.tensors if not tensor.decision.quantize}


def test_every_tensor_has_a_reason_and_a_place(source):
    made = plan_of(source)
    assert {tensor.info.name for tensor in made.tensors} == llama().keys()
    assert {tensor.info.name for tensor in made.quantized} == NAMES
    assert set(reasons(made).values()) == {"norm", "embedding", "lm_head"}
    for tensor in made.tensors:
        names = {stored.name for stored in tensor.stored.values()}
        expected = {tensor.info.name}
        if tensor.decision.quantize:
            expected |= {f"{tensor.info.name}_absmax{suffix}" for suffix in ("", "_scale", "_offset")}
        assert names == expected


def test_sizes_are_those_of_the_memory_layout(source):
    made = plan_of(source)
    for tensor in made.quantized:
        n = tensor.values
        assert tensor.stored_bytes == n // 2 + n // 64 + 8 * -(-n // (64 * 256))
        assert tensor.bits_per_weight == 8 * tensor.stored_bytes / n
    for tensor in made.tensors:
        if not tensor.decision.quantize:
            assert tensor.stored_bytes == tensor.info.nbytes == 2 * tensor.values


def test_kept_modules_are_full_names_of_everything_with_two_axes(source):
    assert plan_of(source).kept_modules() == ["lm_head", "model.embed_tokens"]
    skipped = plan_of(source, skip_first_layers=1).kept_modules()
    assert set(skipped) == {"lm_head", "model.embed_tokens", *(name for name in LINEARS if ".layers.0." in name)}


def test_kept_experts_are_listed_by_the_module_that_holds_them_all(tmp_path):
    tensors = llama()
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        tensors |= {
            f"{experts}.0.{leaf}_proj.weight": np.ones((128, 128), np.float32) for leaf in ("gate", "up", "down")
        }
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = np.ones((2, 128, 128), np.float32)
    write_checkpoint(tmp_path, tensors)
    kept = plan_of(tmp_path, skip_first_layers=1).kept_modules()
    assert {"model.layers.0.mlp.experts", "model.layers.0.mlp.experts.0.up_proj"} <= set(kept)
    assert "model.layers.1.mlp.experts" in kept
    assert "model.layers.1.mlp.experts" not in plan_of(write_without_fused(tmp_path, tensors)).kept_modules()


def write_without_fused(folder, tensors):
    del tensors["model.layers.1.mlp.experts.gate_up_proj"]
    return write_checkpoint(folder / "unfused", tensors)


def test_a_tied_head_has_no_tensor_and_is_listed(tmp_path):
    write_checkpoint(tmp_path, llama(tied=True))
    made = plan_of(tmp_path)
    assert not any(tensor.info.name.startswith("lm_head") for tensor in made.tensors)
    assert made.kept_modules() == ["model.embed_tokens", "lm_head"]


def test_a_tied_head_that_is_stored_all_the_same_is_kept_once(tmp_path):
    tensors = llama()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_checkpoint(tmp_path, tensors, config=CONFIG | {"tie_word_embeddings": True})
    assert plan_of(tmp_path).kept_modules().count("lm_head") == 1


@pytest.mark.parametrize(
    ("tensors", "heads"),
    [
        (["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"], ["lm_head"]),
        (["model.embed_tokens.weight", "lm_head.weight"], []),
        (["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"], ["lm_head", "cls.predictions.decoder"]),
        (["cls.predictions.bias", "cls.predictions.decoder.weight"], ["lm_head"]),
        (["roberta.embeddings.word_embeddings.weight", "lm_head.dense.weight"], ["lm_head", "lm_head.decoder"]),
        (["distilbert.x.weight", "vocab_transform.weight"], ["lm_head", "vocab_projector"]),
        (["bert.encoder.layer.0.x.weight", "lm_head.bias"], ["lm_head", "lm_head.decoder"]),
        (["speecht5.decoder.prenet.embed_tokens.weight"], ["lm_head", "text_decoder_postnet.lm_head"]),
        (["model.embed_tokens.embedding_projection.weight"], ["lm_head", "unembedding_projection"]),
    ],
)
def test_heads_that_no_file_holds_are_known_by_their_neighbours(tensors, heads):
    assert tied_heads(tensors) == heads


@pytest.mark.parametrize(
    ("name", "parameters", "shares"),
    [
        ("nf4", {}, False),
        ("fp4", {}, True),
        ("fp8", {}, True),
        ("fp8", {"scaling": "channel"}, False),
        ("fp8", {"scaling": "block"}, False),
    ],
)
def test_who_shares_an_amax(source, name, parameters, shares):
    groups = {tensor.module: set(tensor.group) for tensor in plan_of(source, name, parameters).quantized}
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    fused = {f"{attention}.{leaf}_proj.weight" for leaf in "qkv"} if shares else {f"{attention}.k_proj.weight"}
    assert groups[f"{attention}.k_proj"] == fused
    assert groups[f"{attention}.o_proj"] == {f"{attention}.o_proj.weight"}
    assert groups[f"{mlp}.up_proj"] >= {f"{mlp}.up_proj.weight"}
    assert (f"{mlp}.gate_proj.weight" in groups[f"{mlp}.up_proj"]) == shares
    assert groups[f"{mlp}.down_proj"] == {f"{mlp}.down_proj.weight"}


def test_a_shape_that_the_format_cannot_take_keeps_its_whole_fused_group(tmp_path):
    tensors = llama()
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((128, 24), np.float32)
    write_checkpoint(tmp_path, tensors)
    kept = reasons(plan_of(tmp_path, "fp4"))
    attention = "model.layers.0.self_attn"
    assert kept[f"{attention}.k_proj.weight"] == "K = 24 is not a multiple of 16"
    for leaf in ("q_proj", "v_proj"):
        assert kept[f"{attention}.{leaf}.weight"] == f"fused with {attention}.k_proj (K = 24 is not a multiple of 16)"
    assert f"{attention}.o_proj.weight" not in kept
    assert f"{attention}.k_proj.weight" not in reasons(plan_of(tmp_path, "nf4"))


def test_tiles_that_readers_would_clip_are_kept_by_the_layout(tmp_path):
    tensors = llama()
    tensors["model.layers.0.self_attn.o_proj.weight"] = np.ones((128, 192), np.float32)
    write_checkpoint(tmp_path, tensors)
    kept = reasons(plan_of(tmp_path, "fp8", {"scaling": "block"}))
    assert "side 192 is not a multiple of 128" in kept["model.layers.0.self_attn.o_proj.weight"]
    assert "model.layers.0.self_attn.o_proj.weight" not in reasons(plan_of(tmp_path, "fp8"))


def test_a_block_that_spans_two_rows_is_kept_for_bitsandbytes_alone(tmp_path):
    name = "model.layers.0.self_attn.o_proj.weight"
    write_checkpoint(tmp_path, {**llama(), name: np.ones((128, 192), np.float32)})
    kept = reasons(plan_of(tmp_path, "nf4", {"block_size": 128}, "bitsandbytes"))
    assert kept[name] == "K = 192 is not a multiple of 128, which bitsandbytes' reader on CPUs needs"
    assert name not in reasons(plan_of(tmp_path, "nf4", {}, "bitsandbytes"))
    assert name not in reasons(plan_of(tmp_path, "nf4", {"block_size": 128}))


@pytest.mark.parametrize("limit", ["1", "20kB", "100kB", "300kB", "5GB"])
def test_shards_hold_at_most_the_limit_and_companions_stay_together(source, limit):
    made = plan_of(source, "fp4", max_shard_size=limit)
    bytes_of = {}
    for tensor in made.tensors:
        bytes_of.setdefault(tensor.shard, []).append(tensor.stored_bytes)
    assert sorted(bytes_of) == list(range(made.shards))
    size = made.options.max_shard_size
    assert all(sum(sizes) <= size or len(sizes) == 1 for sizes in bytes_of.values())
    assert [tensor.shard for tensor in made.tensors] == sorted(tensor.shard for tensor in made.tensors)
    if limit == "1":
        assert made.shards == len(made.tensors)


def test_the_number_of_source_shards_is_no_matter(source, tmp_path):
    torn = write_checkpoint(tmp_path, shards=3)
    whole, cut = plan_of(source, "fp4"), plan_of(torn, "fp4")
    key = {tensor.info.name: (tensor.decision, set(tensor.group)) for tensor in whole.tensors}
    assert {tensor.info.name: (tensor.decision, set(tensor.group)) for tensor in cut.tensors} == key


def test_skip_patterns(source):
    kept = reasons(plan_of(source, skip=("layers.1.mlp", "re:o_proj$")))
    assert kept["model.layers.1.mlp.down_proj.weight"] == "matches --skip layers.1.mlp"
    assert kept["model.layers.0.self_attn.o_proj.weight"] == "matches --skip re:o_proj$"
    assert "model.layers.0.mlp.down_proj.weight" not in kept
    fused = reasons(plan_of(source, skip=("*.q_proj",)))
    assert fused["model.layers.0.self_attn.v_proj.weight"].startswith("fused with model.layers.0.self_attn.q_proj")


def test_a_skip_pattern_that_matches_nothing_is_refused_with_what_is_near(source):
    with pytest.raises(UnknownSkipPatternError, match=r"`skip` up_porj: matches no tensor; did you mean up_proj"):
        plan_of(source, skip=("up_porj",))


def test_more_layers_than_there_are(source):
    with pytest.raises(SkipLayersError, match="the model has only 2 layers"):
        plan_of(source, skip_first_layers=2, skip_last_layers=1)


def test_nothing_left_to_quantize_counts_the_reasons(source):
    with pytest.raises(NothingToQuantizeError, match=r"all tensors are kept: 14 --skip-first-layers 2; 5 norm; 1 "):
        plan_of(source, skip_first_layers=2)


@pytest.mark.parametrize(
    "declared",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
)
def test_a_quantized_source_is_refused_by_its_method(tmp_path, declared):
    write_checkpoint(tmp_path, config=CONFIG | declared)
    with pytest.raises(AlreadyQuantizedError, match=r"already quantized \(gptq\); start from the unquantized"):
        plan_of(tmp_path)


def test_two_tensors_of_one_name_in_the_artifact_are_refused(tmp_path):
    clash = "model.layers.0.mlp.up_proj.weight_absmax"
    write_checkpoint(tmp_path, llama() | {clash: np.ones(3, np.float32)})
    with pytest.raises(NameClashError, match=f"^{clash}: both .* would be stored under this name"):
        plan_of(tmp_path)


@pytest.mark.parametrize("dtype", ["I64", "U8", "F64", "BOOL"])
def test_other_dtypes_are_kept_with_their_name(tmp_path, dtype):
    write_checkpoint(tmp_path, dtype=dtype)
    with pytest.raises(NothingToQuantizeError, match=f"dtype {dtype}"):
        plan_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "parameters", "hint"),
    [("fp8", {"scaling": "block"}, "; `scaling='channel'` takes every shape"), ("fp4", {}, "")],
)
def test_widths_that_no_tile_divides_get_the_scaling_that_takes_them(tmp_path, name, parameters, hint):
    side = 576 if name == "fp8" else 568
    write_checkpoint(tmp_path, {"model.layers.0.mlp.up_proj.weight": np.ones((side, side), np.float32)})
    with pytest.raises(NothingToQuantizeError, match=rf"{side} is not a multiple of .*{re.escape(hint)}$"):
        plan_of(tmp_path, name, parameters)
    other = plan_of(tmp_path, "fp8", {"scaling": "channel"})
    assert len(other.quantized) == 1
