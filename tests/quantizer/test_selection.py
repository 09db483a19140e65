"""Layer selection on hand-written names: what is quantized, what is kept and why, and what the user's options do."""

import subprocess
import sys

import pytest

from surogate_quantize.selection import Decision, SkipOptions, keep_groups_whole, select

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


def reasons(names, config=None, skip=None, **shapes):
    tensors = {name: ("BF16", shapes.get(name, SQUARE)) for name in names}
    return {name: d.reason for name, d in select(tensors, config or {}, skip or SkipOptions()).items()}


def kept(tensors, config=None, **skip):
    decisions = select(tensors, config or {}, SkipOptions(**skip))
    baseline = select(tensors, config or {}, SkipOptions())
    return {name for name in tensors if baseline[name].quantize and not decisions[name].quantize}


# Name, shape (None: 64x64), reason. All in a file whose config says nothing.
NAMES = [
    ("model.layers.0.self_attn.q_proj.weight", None, "linear"),
    ("transformer.h.0.mlp.dense_h_to_4h.weight", None, "linear"),
    ("gpt_neox.layers.3.attention.query_key_value.weight", None, "linear"),
    ("bert.encoder.layer.0.attention.output.dense.weight", None, "linear"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", None, "linear"),
    ("encoder.block.0.layer.1.DenseReluDense.wo.weight", None, "linear"),
    ("transformer.encoder.layers.0.self_attention.query_key_value.weight", None, "linear"),
    ("model.layers.0.self_attn.W_pack.weight", None, "linear"),
    ("model.layers.0.attention.wqkv.weight", None, "linear"),
    ("model.layers.0.self_attn.qkv_proj.base_layer.weight", None, "linear"),
    ("transformer.attentions.0.q_lin.weight", None, "linear"),
    ("model.layers.0.conv.in_proj.weight", None, "linear"),
    ("backbone.layers.0.mixer.in_proj.weight", (256, 64), "linear"),
    ("backbone.layers.0.mixer.out_proj.weight", (64, 128), "linear"),
    ("model.layers.0.mlp.experts.3.down_proj.weight", None, "linear"),
    ("model.layers.0.block_sparse_moe.experts.3.w1.weight", None, "linear"),
    ("model.layers.0.mlp.shared_experts.gate_proj.weight", None, "linear"),
    ("model.layers.0.per_layer_input_gate.weight", None, "linear"),
    ("model.layers.0.laurel.linear_left.weight", None, "linear"),
    ("transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight", None, "linear"),
    ("model.language_model.layers.0.mlp.up_proj.weight", None, "linear"),
    ("model.embed_tokens.weight", None, "embedding"),
    ("transformer.wte.weight", None, "embedding"),
    ("shared.weight", None, "embedding"),
    ("model.embed_tokens_per_layer.weight", None, "embedding"),
    ("bert.embeddings.word_embeddings.weight", None, "embedding"),
    ("transformer.wpe.weight", None, "position table"),
    ("bert.embeddings.position_embeddings.weight", None, "position table"),
    ("model.decoder.embed_positions.weight", None, "position table"),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", None, "position table"),
    ("lm_head.weight", None, "lm_head"),
    ("embed_out.weight", None, "lm_head"),
    ("language_model.lm_head.weight", None, "lm_head"),
    ("bert.pooler.dense.weight", None, "task head"),
    ("score.weight", None, "task head"),
    ("model.norm.weight", (64,), "norm"),
    ("model.layers.0.self_attn.q_norm.weight", (64,), "norm"),
    ("transformer.h.0.ln_1.weight", (64,), "norm"),
    ("bert.encoder.layer.0.output.LayerNorm.weight", (64,), "norm"),
    ("model.layers.0.input_layernorm.W_down.weight", None, "norm"),
    ("model.layers.0.self_attn.q_proj.bias", (64,), "bias"),
    ("model.layers.0.mlp.gate.e_score_correction_bias", (64,), "bias"),
    ("model.layers.0.mlp.experts.down_proj_bias", (4, 64), "bias"),
    ("model.layers.0.mlp.gate.weight", None, "router"),
    ("model.layers.0.mlp.gate.wg.weight", None, "router"),
    ("model.layers.0.block_sparse_moe.gate.weight", None, "router"),
    ("model.layers.0.feed_forward.router.weight", None, "router"),
    ("model.layers.0.mlp.shared_expert_gate.weight", (1, 64), "router"),
    ("transformer.blocks.0.ffn.router.layer.weight", None, "router"),
    ("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 64), "fused 3-D experts"),
    ("model.layers.0.block_sparse_moe.input_linear.weight", (4, 64, 64), "fused 3-D experts"),
    ("transformer.blocks.0.ffn.experts.mlp.w1", (256, 64), "fused 2-D experts"),
    ("model.layers.0.linear_attn.conv1d.weight", (64, 1, 4), "convolution"),
    ("encoder.layers.0.conv.depthwise_conv.weight", (64, 1, 4), "convolution"),
    ("backbone.layers.0.mixer.A_log", (64, 16), "SSM parameter"),
    ("backbone.layers.0.mixer.D", (64,), "SSM parameter"),
    ("backbone.layers.0.mixer.dt_bias", (64,), "SSM parameter"),
    ("backbone.layers.0.mixer.x_proj.weight", (36, 64), "SSM parameter"),
    ("backbone.layers.0.mixer.dt_proj.weight", (64, 4), "SSM parameter"),
    ("rwkv.blocks.0.attention.time_decay", (64,), "SSM parameter"),
    ("model.layers.0.linear_attn.in_proj_a.weight", (4, 64), "per-head recurrence gate"),
    ("model.layers.0.linear_attn.in_proj_ba.weight", (8, 64), "per-head recurrence gate"),
    ("model.layers.0.self_attn.indexer.weights_proj.weight", (4, 64), "kept in fp32 by its model"),
    ("encoder.block.0.layer.2.DenseReluDense.wo.weight", None, "kept in fp32 by its model"),
    ("model.layers.0.attn.wo_a.weight", None, "grouped (block-diagonal) linear"),
    ("model.layers.0.altup.prediction_coefs.weight", (16, 4), "AltUp coefficients"),
    ("model.layers.0.self_attn.qkv_proj.lora_A.speech.weight", None, "LoRA adapter"),
    ("model.layers.0.sandwich_scale.weight", (64,), "1-D"),
    ("depth_decoder.model.layers.0.mlp.fc1.weight", (8, 64, 64), "3-D"),
    ("model.layers.0.hc_attn_fn", None, "not stored as a module's .weight"),
    ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", None, "vision tower"),
    ("visual.blocks.0.attn.qkv.weight", None, "vision tower"),
    ("vpm.encoder.layers.0.mlp.fc1.weight", None, "vision tower"),
    ("transformer.visual.transformer.resblocks.0.mlp.c_fc.weight", None, "vision tower"),
    ("audio_tower.layers.0.fc1.weight", None, "audio tower"),
    ("model.multi_modal_projector.linear_1.weight", None, "modality projector"),
    ("talker.model.layers.0.mlp.up_proj.weight", None, "audio generator"),
    ("mtp.layers.0.mlp.up_proj.weight", None, "MTP head"),
    ("mtp.fc.weight", None, "MTP head"),
    (f"model.layers.{'9' * 5000}.mlp.up_proj.weight", None, "not in an encoder or decoder block"),
    ("mlp1.0.weight", None, "not in an encoder or decoder block"),
    ("model.per_layer_model_projection.weight", None, "not in an encoder or decoder block"),
]


# Neighbours that decide: what makes x_proj a part of an SSM, and wo T5's.
NEIGHBOURS = ("encoder.block.0.layer.2.DenseReluDense.wi_0.weight",)


def test_names_decide():
    tensors = {name: ("BF16", shape or SQUARE) for name, shape, _ in NAMES}
    tensors |= dict.fromkeys(NEIGHBOURS, ("BF16", SQUARE))
    decisions = select(tensors, {}, SkipOptions())
    assert {name: decisions[name].reason for name, _, _ in NAMES} == {name: reason for name, _, reason in NAMES}
    assert all(decision.quantize == (decision.reason == "linear") for decision in decisions.values())


def test_order_is_kept_and_towers_take_any_tensor():
    tensors = dict(reversed(llama(2).items()))
    assert list(select(tensors, {}, SkipOptions())) == list(tensors)
    assert reasons(["vision_tower.norm.weight", "vision_tower.patch_embed.proj.bias"]) == {
        "vision_tower.norm.weight": "vision tower",
        "vision_tower.patch_embed.proj.bias": "vision tower",
    }


@pytest.mark.parametrize(
    ("model_type", "name", "reason"),
    [
        ("vision-encoder-decoder", "encoder.encoder.layer.0.attention.query.weight", "vision tower"),
        ("vision-encoder-decoder", "encoder.embeddings.patch_embeddings.projection.weight", "vision tower"),
        ("vision-encoder-decoder", "decoder.model.decoder.layers.0.fc1.weight", "linear"),
        ("speech-encoder-decoder", "encoder.encoder.layers.0.attention.k_proj.weight", "audio tower"),
        ("granite_speech", "encoder.layers.0.attn.to_q.weight", "audio tower"),
        ("whisper", "model.encoder.layers.0.fc1.weight", "linear"),
        ("bert", "encoder.layer.0.attention.self.query.weight", "linear"),
    ],
)
def test_encoders_that_only_the_model_type_tells_from_towers(model_type, name, reason):
    assert reasons([name], {"model_type": model_type}) == {name: reason}


@pytest.mark.parametrize(("dtype", "reason"), [("F32", "linear"), ("F16", "linear"), ("BF16", "linear")])
def test_dtypes_that_are_quantized(dtype, reason):
    name = "model.layers.0.mlp.up_proj.weight"
    assert select({name: (dtype, SQUARE)}, {}, SkipOptions())[name] == Decision(True, reason)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("I64", ", stored as I32"),
        ("BOOL", ", stored as U8"),
        ("F64", ", stored as F32"),
        ("F8_E8M0", ", stored as U8"),
        ("U8", ""),
        ("F8_E4M3", ""),
    ],
)
def test_dtypes_that_are_kept(dtype, stored):
    name = "model.layers.0.mlp.up_proj.weight"
    assert select({name: (dtype, SQUARE)}, {}, SkipOptions())[name] == Decision(False, f"dtype {dtype}{stored}")


def test_conv1d_is_kept_by_model_type_or_by_shape():
    square, wide, tall = (64, 64), (64, 192), (192, 64)
    names = ["h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight"]
    conv1d = dict.fromkeys(names, "Conv1D weight is stored [in, out]")
    assert reasons(names, {"model_type": "gpt2"}) == conv1d
    assert reasons(names, {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}) == conv1d
    assert reasons(names, {"model_type": "remote"}, **{names[0]: wide, names[1]: square}) == conv1d
    linears = dict.fromkeys(names, "linear")
    assert reasons(names, {"model_type": "gpt_bigcode"}, **{names[0]: tall}) == linears


def test_weights_that_their_model_reads_raw():
    raw = "read as a raw weight by its model"
    names = ["rwkv.blocks.0.attention.output.weight", "rwkv.blocks.0.attention.key.weight"]
    assert list(reasons(names, {"model_type": "rwkv"}).values()) == [raw, "linear"]
    names = ["backbone.layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.out_proj.weight"]
    assert list(reasons(names, {"model_type": "mamba2"}).values()) == ["linear", raw]
    assert list(reasons(names, {"model_type": "jamba"}).values()) == ["linear", "linear"]
    names = ["deberta.encoder.layer.0.attention.self.in_proj.weight"]
    assert list(reasons(names, {"model_type": "deberta"}).values()) == [raw]
    names = ["layers.0.attn.in_proj_weight", "layers.0.attn.out_proj.weight"]
    assert list(reasons(names).values()) == ["not stored as a module's .weight", raw]


def test_blocks_beyond_the_configs_depth_are_mtp_heads():
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 11, "num_nextn_predict_layers": 1}
    decisions = select(llama(12), config, SkipOptions())
    assert {d.reason for name, d in decisions.items() if ".layers.11." in name} == {"MTP head"}
    assert decisions["model.layers.10.mlp.up_proj.weight"].quantize


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 12},
        {"n_layer": 12},
        {"text_config": {"num_hidden_layers": 12}, "vision_config": {"num_hidden_layers": 4}},
        {"thinker_config": {"text_config": {"num_hidden_layers": 12}}},
        {"text_config": {"model_type": "llama"}, "vision_config": {"num_hidden_layers": 4}},
        {},
    ],
)
def test_depth_comes_from_the_text_config_or_from_the_names(config):
    last = kept(llama(12), config, last_layers=1)
    assert last == {name for name in llama(12) if ".layers.11." in name and "norm" not in name}


def test_a_fused_group_is_kept_as_a_whole():
    decisions = select(llama(2), {}, SkipOptions(patterns=("layers.0.self_attn.k_proj", "layers.1.mlp.up_proj")))
    fused = "fused with model.layers.0.self_attn.k_proj (matches --skip layers.0.self_attn.k_proj)"
    assert decisions["model.layers.0.self_attn.q_proj.weight"] == Decision(False, fused)
    assert decisions["model.layers.0.self_attn.v_proj.weight"] == Decision(False, fused)
    assert decisions["model.layers.0.self_attn.o_proj.weight"].quantize
    assert not decisions["model.layers.1.mlp.gate_proj.weight"].quantize
    assert decisions["model.layers.1.mlp.down_proj.weight"].quantize


def mixtral(layers=2, experts=3):
    return [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}.weight"
        for layer in range(layers)
        for expert in range(experts)
        for leaf in ("w1", "w2", "w3")
    ]


def test_experts_of_a_layer_are_kept_together():
    tensors = dict.fromkeys(mixtral(), ("BF16", SQUARE))
    assert kept(tensors, patterns=("layers.1.block_sparse_moe.experts.2.w2",)) == {
        name for name in tensors if ".layers.1." in name
    }


def test_plans_reasons_keep_groups_whole_too():
    decisions = {name: Decision(True, "linear") for name in llama(1) if "self_attn" in name}
    decisions["model.layers.0.self_attn.v_proj.weight"] = Decision(False, "K = 60 is no multiple of 16")
    whole = keep_groups_whole(decisions)
    assert [decision.quantize for decision in whole.values()] == [False, False, False, True]
    assert whole["model.layers.0.self_attn.v_proj.weight"].reason == "K = 60 is no multiple of 16"


def test_no_heavy_import():
    code = "import sys, surogate_quantize.selection; sys.exit(bool({'torch', 'numpy', 'numba'} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)}).returncode
        == 0
    )
