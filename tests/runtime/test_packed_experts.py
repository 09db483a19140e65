"""Packed experts have no linear layer to live in: refused by name wherever they would be lost or read wrongly."""

import logging

import pytest
import torch
import transformers
from runtime.artifacts import write_artifact
from runtime.layers import KINDS

from surogate_load import load_model
from surogate_load.errors import PackedExpertsError
from surogate_load.linear import QuantizedLinear

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16,
         "num_key_value_heads": 2, "num_experts_per_tok": 2}  # fmt: skip
QWEN3 = (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig,
         {"num_experts": 4, "moe_intermediate_size": 32, "intermediate_size": 64})  # fmt: skip
MIXTRAL = (transformers.MixtralForCausalLM, transformers.MixtralConfig,
           {"num_local_experts": 2, "intermediate_size": 32})  # fmt: skip
IDS = torch.arange(10).reshape(1, 10)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    made = {}

    def make_artifact(architecture, kind, keep=("mlp.gate.", "block_sparse_moe.gate.")):
        key = (architecture[0].__name__, kind, keep)
        if key not in made:
            cls, config, sizes = architecture
            torch.manual_seed(0)
            model = cls(config(**SIZES, **sizes)).bfloat16()
            made[key] = write_artifact(model, tmp_path_factory.mktemp("experts"), KINDS[kind], keep=keep)
        return made[key]

    return make_artifact


def from_pretrained(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "fp8-channel"])
@pytest.mark.parametrize("architecture", [QWEN3, MIXTRAL], ids=["qwen3", "mixtral"])
def test_load_model_refuses_them_by_name(make, architecture, kind):
    with pytest.raises(PackedExpertsError, match=r"experts\.0\.\w+ is packed, .*; quantize again with --skip experts$"):
        load_model(make(architecture, kind))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("architecture", [QWEN3, MIXTRAL], ids=["qwen3", "mixtral"])
def test_from_pretrained_refuses_them_where_they_would_be_wrong(make, architecture, kind):
    with pytest.raises(PackedExpertsError, match="experts") as caught:
        from_pretrained(make(architecture, kind))
    assert str(caught.value).isprintable()


def test_from_pretrained_says_that_right_ones_are_not_packed(make, caplog):
    path = make(QWEN3, "fp8-channel")
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        model = from_pretrained(path)
    assert len(caplog.messages) == 1
    assert "transformers' own reader" in caplog.messages[0]
    assert "doesn't take its experts yet" in caplog.messages[0]
    assert torch.isfinite(model(IDS).logits).all()


def test_from_pretrained_of_a_dense_architecture_points_to_load_model(artifact, caplog):
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        from_pretrained(artifact("fp4"))
    assert [line.endswith("surogate_load.load_model keeps it packed") for line in caplog.messages] == [True]


def test_other_peoples_checkpoints_are_never_refused_and_wrong_experts_said(make, artifact, tmp_path, caplog):
    for kind, path, said in (("dense", artifact("fp4"), 0), ("right", make(QWEN3, "fp8-channel"), 0),
                             ("wrong", make(QWEN3, "fp4"), 1)):  # fmt: skip
        folder = tmp_path / kind
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((path / name).read_bytes())
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="surogate_load"):
            from_pretrained(folder)
        ours = [record.getMessage() for record in caplog.records if record.name == "surogate_load"]
        assert ["experts wrongly" in line for line in ours] == [True] * said


def test_kept_experts_leave_the_rest_packed(make):
    model = load_model(make(QWEN3, "nf4", keep=("mlp.",)))
    assert type(model.model.layers[0].self_attn.q_proj) is QuantizedLinear
    assert torch.isfinite(model(IDS).logits).all()
