"""Where packed experts load, where transformers would read them wrongly, and what no loader takes: refused by name."""

import json
import logging

import pytest
import torch
import transformers
from runtime.experts import IDS
from safetensors.torch import load_file, save_file

from surogate_load import load_model
from surogate_load.errors import MismatchedModelError, PackedExpertsError, UnrecordedSaveError
from surogate_load.experts.module import QuantizedExperts
from surogate_load.linear import QuantizedLinear


@pytest.fixture
def edited(expert_artifact, tmp_path):
    """A peer's checkpoint: an artifact without our manifest, whose tensors and config were changed."""

    def edit(family, kind, change):
        path = expert_artifact(family, kind)
        tensors = load_file(path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return edit


def from_pretrained(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["nf4", "fp4-modelopt"])
def test_from_pretrained_keeps_experts_packed_in_our_own_methods(expert_artifact, kind):
    model = from_pretrained(expert_artifact("mixtral", kind))
    assert type(model.model.layers[0].mlp.experts) is QuantizedExperts
    assert torch.isfinite(model(IDS).logits).all()


def test_from_pretrained_refuses_experts_that_would_be_wrong(expert_artifact):
    with pytest.raises(PackedExpertsError, match=r"mlp\.experts wrongly .*; surogate_load\.load_model reads them"):
        from_pretrained(expert_artifact("qwen3", "fp4"))


def test_from_pretrained_points_to_load_model(expert_artifact, artifact, caplog):
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        from_pretrained(expert_artifact("qwen3", "fp8-channel"))
        from_pretrained(artifact("fp4"))
    assert [line.endswith("surogate_load.load_model keeps it packed") for line in caplog.messages] == [True, True]


def test_other_peoples_checkpoints_are_never_refused_and_wrong_experts_said(
    expert_artifact, artifact, tmp_path, caplog
):
    for kind, path, said in (("dense", artifact("fp4"), 0), ("right", expert_artifact("qwen3", "fp8-channel"), 0),
                             ("wrong", expert_artifact("qwen3", "fp4"), 1)):  # fmt: skip
        folder = tmp_path / kind
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((path / name).read_bytes())
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="surogate_load"):
            from_pretrained(folder)
        ours = [record.getMessage() for record in caplog.records if record.name == "surogate_load"]
        assert ["experts wrongly" in line for line in ours] == [True] * said


def test_kept_experts_leave_the_rest_packed(expert_artifact):
    model = load_model(expert_artifact("qwen3", "nf4", ("mlp.",)))
    assert type(model.model.layers[0].self_attn.q_proj) is QuantizedLinear
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("keep", [("experts.2.",), ("down_proj",)], ids=["one expert", "one projection"])
def test_experts_are_taken_whole(expert_artifact, keep):
    with pytest.raises(PackedExpertsError, match=r"experts\.\d\.\w+ is not packed, but others are: .*--skip experts$"):
        load_model(expert_artifact("qwen3", "nf4", keep))


def test_more_experts_than_the_model_has(edited):
    def fewer(tensors, config):
        config.update(dict.fromkeys({"num_experts", "num_local_experts"} & config.keys(), 3))
        tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.mlp.gate.weight"][:3].clone()

    with pytest.raises(PackedExpertsError, match=r"experts\.3\.\w+ is packed, but the model has no such expert"):
        load_model(edited("qwen3", "fp8-channel", fewer))


def test_an_expert_unlike_the_others(edited):
    def other_scale(tensors, config):
        name = "model.layers.0.mlp.experts.1.up_proj.weight_scale"
        tensors[name] = tensors[name].reshape(1)

    with pytest.raises(MismatchedModelError, match=r"1\.up_proj\.weight_scale"):
        load_model(edited("qwen3", "fp8-modelopt", other_scale))


def test_a_class_that_computes_otherwise_is_refused(expert_artifact, monkeypatch):
    path = expert_artifact("qwen3", "nf4")
    experts = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts
    monkeypatch.setattr(experts, "__init__", _with_another_parameter(experts.__init__))
    with pytest.raises(PackedExpertsError, match="Qwen3MoeExperts computes with its experts in a way"):
        load_model(path)


def _with_another_parameter(original):
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.temperature = torch.nn.Parameter(torch.ones(1))

    return init


def test_what_only_some_experts_have_beside_their_weights_is_not_lost_silently(edited, tmp_path):
    def one_scale(tensors, config):
        del tensors["model.layers.0.mlp.experts.1.up_proj.input_scale"]

    model = load_model(edited("qwen3", "fp8-modelopt", one_scale))
    with pytest.raises(UnrecordedSaveError, match="input_scale"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.28), ("fp4", 0.29), ("fp8-tensor", 0.53)])
def test_experts_take_the_bytes_of_the_files(expert_artifact, kind, most):
    path = expert_artifact("qwen3", kind)
    experts = load_model(path).model.layers[0].mlp.experts
    held = sum(parameter.numel() * parameter.element_size() for parameter in experts.parameters())
    stored = load_file(path / "model.safetensors").items()
    assert held == sum(tensor.numel() * tensor.element_size() for name, tensor in stored if ".experts." in name)
    assert held < most * 2 * 4 * 3 * 128 * 128


def test_moves_and_casts_leave_packed_bytes_alone(expert_artifact):
    model = load_model(expert_artifact("gpt-oss", "fp8-channel"))
    experts = model.model.layers[0].mlp.experts
    before = {name: experts.get_parameter(name).clone() for name in experts.packed_names}
    order = [name for name, _ in experts.named_parameters()]
    model.to(torch.float32)
    assert experts.compute_dtype == experts.down_proj_bias.dtype == torch.float32
    assert [name for name, _ in experts.named_parameters()] == order
    for name, tensor in before.items():
        assert experts.get_parameter(name).dtype == tensor.dtype
        assert torch.equal(experts.get_parameter(name).view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(expert_artifact, dtype):
    path = expert_artifact("qwen3", "nf4")
    expected = load_model(path, dtype=torch.float32)(IDS).logits
    found = load_model(path, dtype=dtype)(IDS).logits
    assert found.dtype == dtype
    assert torch.norm(found.float() - expected) < 0.03 * torch.norm(expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = load_model(path, dtype=torch.float32)(IDS).logits
    assert torch.norm(mixed.float() - expected) < 0.03 * torch.norm(expected)


def test_other_recipes_say_that_experts_multiply_in_bf16(expert_artifact, caplog):
    path = expert_artifact("qwen3", "fp8-tensor")
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        model = load_model(path, "fp8-hybrid", emulate=True)
    assert any("experts multiply as under recipe bf16" in line for line in caplog.messages)
    assert torch.isfinite(model(IDS).logits).all()
