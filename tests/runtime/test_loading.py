"""load_model: packed as on disk, exact, strict about every tensor, and one line for whatever is wrong."""

import json
import logging
import subprocess
import sys

import pytest
import torch
import transformers
from runtime.artifacts import tiny_llama, write_artifact
from runtime.layers import KINDS
from safetensors.torch import load_file, save_file

from surogate_formats.artifact import Artifact, IncompleteArtifactError
from surogate_formats.errors import ArtifactError, UsageError
from surogate_formats.nf4 import NF4
from surogate_formats.recipe import IncompatibleRecipeError, Recipe
from surogate_load import load_model, open_artifact, recoding
from surogate_load.errors import (
    DeviceUnavailableError,
    MismatchedModelError,
    MissingExtraError,
    TransformersTooOldError,
    UnknownArchitectureError,
    UnsupportedDeviceError,
    UnsupportedModuleError,
)
from surogate_load.linear import QuantizedLinear

every_kind = pytest.mark.parametrize("kind", KINDS)
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def dense_twin(path, cls=transformers.AutoModelForCausalLM):
    """The dense model that holds the artifact's dequantized weights."""
    with Artifact.open(path) as opened:
        model = cls.from_pretrained(path.parent / "dense", dtype="auto")
        with torch.no_grad():
            for module in opened.modules:
                weight = model.get_submodule(module).weight
                weight.copy_(torch.from_numpy(opened.dequantize(module)).to(weight.dtype))
    return model


@every_kind
def test_logits_are_those_of_the_dequantized_weights(artifact, kind):
    path = artifact(kind)
    model, dense = load_model(path), dense_twin(path)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nf4-dynamic"])
def test_tensors_are_the_files_and_memory_is_theirs(artifact, kind):
    path = artifact(kind)
    model, stored = load_model(path), load_file(path / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(as_bytes(state[name]), as_bytes(tensor)), name
    held = {p.data_ptr(): p.nbytes for p in model.parameters()}
    assert sum(held.values()) == sum(tensor.nbytes for tensor in stored.values())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_layers_hold_the_parts_where_names_on_disk_have_dots(artifact):
    """Beside them layout bitsandbytes stores maps and states, which no layer needs."""
    path = artifact("nf4-dynamic")
    model = load_model(path)
    state = model.state_dict()
    with open_artifact(path) as opened:
        assert opened.artifact.layout.name == "bitsandbytes"
        for module, weight in opened.items():
            names = ("weight", "weight_absmax", "weight_nested_absmax", "weight_nested_offset")
            assert model.get_submodule(module).part_names == names
            for name, part in zip(names, weight.parts().values(), strict=True):
                tensor = state.pop(f"{module}.{name}")
                assert tensor.dtype == part.dtype
                assert torch.equal(tensor, part)
        kept = {name for name, record in opened.artifact.manifest.tensors.items() if record.decision == "keep"}
    assert state.keys() == kept
    as_float = load_model(path, dtype=torch.float32).state_dict()
    for name, tensor in load_file(path / "model.safetensors").items():
        if name in kept:
            assert torch.equal(state[name], tensor)
            assert torch.equal(as_float[name], tensor.float())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["nf4", "nf4-dynamic", "fp4", "fp8-channel"])
def test_other_dtypes_and_tied_embeddings(artifact, kind, dtype):
    path = artifact(kind, dtype=dtype, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    model = load_model(path)
    assert model.dtype == model.model.layers[0].mlp.up_proj.compute_dtype == getattr(torch, dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.up_proj.bias is not None
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense_twin(path)(IDS).logits)


def test_dtype_on_request(artifact):
    model = load_model(artifact("nf4"), dtype=torch.float32)
    assert model.dtype == torch.float32
    assert model.model.layers[1].mlp.down_proj.compute_dtype == torch.float32
    assert model.model.layers[1].mlp.down_proj.weight.dtype == torch.uint8


def test_kept_layers_stay_dense(tmp_path):
    path = write_artifact(tiny_llama(), tmp_path, NF4(), keep=("layers.0.mlp",))
    model = load_model(path)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert type(model.model.layers[1].mlp.up_proj) is QuantizedLinear


def test_an_encoder_loads_as_the_class_that_its_config_names(tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80
    )
    torch.manual_seed(0)
    bert = transformers.BertForMaskedLM(config)
    path = write_artifact(bert, tmp_path, NF4())
    model = load_model(path)
    assert type(model) is transformers.BertForMaskedLM
    assert type(model.bert.encoder.layer[0].attention.self.query) is QuantizedLinear
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense_twin(path, transformers.BertForMaskedLM)(IDS).logits)


def test_plain_from_pretrained_loads_our_layout(artifact):
    model = transformers.AutoModelForCausalLM.from_pretrained(artifact("nf4"), dtype="auto")
    assert type(model.model.layers[0].mlp.up_proj) is QuantizedLinear
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, load_model(artifact("nf4"))(IDS).logits)
    packed = model.model.layers[0].mlp.up_proj.parts
    assert not any(part.requires_grad for part in packed)


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = (
        "import sys, surogate_load; assert not {'torch', 'transformers', 'peft'} & set(sys.modules); "
        "import transformers.quantizers.auto as auto; assert 'surogate' in auto.AUTO_QUANTIZER_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=python_path())


def test_without_transformers_one_line_names_the_extra(artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"surogate-quant\[train\]"):
        load_model(artifact("nf4"))


def python_path():
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_recorded_recipe_is_the_default(tmp_path, caplog):
    recorded = Recipe("fp8-hybrid", margin=2, amax_history_len=5)
    path = write_artifact(tiny_llama(num_hidden_layers=1), tmp_path, NF4(), recipe=recorded)
    with pytest.raises(UnsupportedDeviceError, match=r"needs CUDA compute capability 8\.9, cpu is no CUDA device"):
        load_model(path)
    layer = load_model(path, emulate=True).model.layers[0].mlp.up_proj
    assert layer.recipe.input.history.shape == (5,)
    assert layer.recipe.input.reach == 448 / 4
    layer = load_model(path, emulate=True, amax_history_len=7, amax_compute_algo="MOST_RECENT")
    assert layer.model.layers[0].mlp.up_proj.recipe.input.history.shape == (7,)
    assert type(load_model(path, recipe="bf16").model.layers[0].mlp.up_proj.recipe).__name__ == "Bf16"


def test_recipes_that_the_machine_cannot_run(artifact):
    with pytest.raises(UnsupportedDeviceError, match=r"nvfp4 needs CUDA compute capability 10\.0.*emulate=True"):
        load_model(artifact("fp4"), recipe="nvfp4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "fp8_hybrid"}, "no recipe 'fp8_hybrid'; did you mean 'fp8-hybrid'"),
        ({"amax_history_length": 3}, "no keyword 'amax_history_length'; did you mean 'amax_history_len'"),
        ({"backend": "triton"}, "`backend` is 'triton'; choose one of cutlass, cudnn"),
        ({"zzz": 1}, "no keyword 'zzz'; known: recipe"),
    ],
)
def test_wrong_arguments(artifact, arguments, message):
    with pytest.raises(UsageError) as caught:
        load_model(artifact("nf4"), **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nf4_under_nvfp4_is_refused_before_anything_is_read(artifact):
    with pytest.raises(IncompatibleRecipeError):
        load_model(artifact("nf4"), recipe="nvfp4", emulate=True)


def test_no_artifact(tmp_path, artifact):
    with pytest.raises(IncompleteArtifactError):
        load_model(artifact("nf4").parent / "dense")


def rewrite(path, out, change_tensors=lambda tensors: None, change_manifest=lambda manifest: None):
    """A copy of an artifact whose tensors and manifest were changed alike, so that they still agree."""
    out.mkdir()
    tensors = load_file(path / "model.safetensors")
    change_tensors(tensors)
    save_file(tensors, out / "model.safetensors")
    manifest = json.loads((path / "surogate.json").read_text())
    change_manifest(manifest["tensors"])
    (out / "surogate.json").write_text(json.dumps(manifest))
    (out / "config.json").write_text((path / "config.json").read_text())
    return out


def test_a_missing_norm_is_an_error_not_a_random_one(artifact, tmp_path):
    name = "model.norm.weight"
    path = rewrite(artifact("nf4"), tmp_path / "out", lambda t: t.pop(name), lambda m: m.pop(name))
    with pytest.raises(MismatchedModelError, match=r"the model needs model\.norm\.weight"):
        load_model(path)


def test_a_tensor_without_a_place_is_an_error(artifact, tmp_path):
    extra = {"decision": "keep", "reason": "", "dtype": "BF16", "shape": [2], "bits_per_weight": 16, "stored": {}}
    path = rewrite(
        artifact("fp4"),
        tmp_path / "out",
        lambda t: t.update({"model.extra": torch.zeros(2, dtype=torch.bfloat16)}),
        lambda m: m.update({"model.extra": {**extra, "stored": {"model.extra": "0" * 64}}}),
    )
    with pytest.raises(MismatchedModelError, match=r"holds model\.extra, which the model has no place for"):
        load_model(path)


def test_a_linear_of_another_size_is_an_error(artifact, tmp_path):
    path = rewrite(artifact("fp8-tensor"), tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 320}))
    with pytest.raises(MismatchedModelError, match=r"down_proj\.weight is F8_E4M3 \[128, 256\], the model needs"):
        load_model(path)


def test_a_missing_scale_is_an_error(artifact, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight_absmax"
    path = rewrite(artifact("nf4"), tmp_path / "out", lambda t: t.pop(name))
    with pytest.raises(ArtifactError, match="weight_absmax"):
        load_model(path)


def test_a_linear_of_another_class_is_refused(artifact, monkeypatch):
    from transformers.models.llama import modeling_llama

    class Scaled(torch.nn.Linear):
        pass

    original = modeling_llama.LlamaMLP.__init__

    def changed(self, config):
        original(self, config)
        self.up_proj = Scaled(self.hidden_size, self.intermediate_size, bias=False)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", changed)
    with pytest.raises(UnsupportedModuleError, match="up_proj is a Scaled"):
        load_model(artifact("nf4"))


def test_nothing_is_logged_in_the_ordinary_case(artifact, caplog):
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        load_model(artifact("fp4"), recipe="nvfp4", emulate=True)
    assert not [record for record in caplog.records if record.name == "surogate_load"]


@pytest.mark.parametrize("device", [f"cuda:{torch.cuda.device_count() + 3}", "nonsense"])
def test_a_device_that_torch_can_not_reach(artifact, device):
    with pytest.raises(DeviceUnavailableError, match=f"device {device}: ") as caught:
        load_model(artifact("nf4"), device=device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_the_default_format_draws_no_word_at_load(artifact, kind, caplog, recwarn):
    with caplog.at_level(logging.INFO, logger="surogate_load"):
        load_model(artifact(kind))
    assert not caplog.records
    assert not [warning for warning in recwarn if "surogate" in str(warning.filename)]


def test_a_model_moves_to_another_dtype_and_keeps_its_packed_bytes(artifact):
    model, stored = load_model(artifact("fp4")).to(torch.float32), load_file(artifact("fp4") / "model.safetensors")
    up_proj = model.model.layers[0].mlp.up_proj
    assert (model.dtype, up_proj.compute_dtype) == (torch.float32, torch.float32)
    assert model(IDS).logits.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        if "_proj.weight" in name:
            assert torch.equal(as_bytes(tensor), as_bytes(stored[name])), name
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.half()


def test_a_model_type_that_transformers_does_not_know(artifact, tmp_path):
    for path in artifact("nf4").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "of_tomorrow"}))
    with pytest.raises(UnknownArchitectureError, match="knows no model_type 'of_tomorrow'") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_load_model_is_the_first_thing_that_a_program_does(artifact):
    code = f"import surogate_load; surogate_load.load_model({str(artifact('nf4'))!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_transformers_that_cannot_restore_a_layout_is_named(artifact, monkeypatch):
    monkeypatch.setattr(recoding, "LEAST_TRANSFORMERS", "99.1")
    with pytest.raises(TransformersTooOldError, match=r"^layout bitsandbytes needs transformers 99\.1 or newer"):
        load_model(artifact("nf4-dynamic"))
