"""from_config: a training file becomes a model that trains; the base is quantized once."""

import logging
import os
import shutil
from importlib.metadata import PackageNotFoundError

import peft
import pytest
import torch
from runtime.artifacts import tiny_llama
from runtime.layers import KINDS

from surogate_formats.errors import UsageError
from surogate_formats.recipe import IncompatibleRecipeError
from surogate_formats.training_config import load_training_config
from surogate_formats.version import VERSION
from surogate_load import from_config, quantized_cache
from surogate_load.errors import (
    DifferentArtifactError,
    NoSuchSourceError,
    QuantizerFailedError,
    SourceMissingError,
    UnsupportedDeviceError,
)
from surogate_load.linear import QuantizedLinear
from surogate_load.quantized_cache import cache_key

YAML = """
qlora_bnb: true
qlora_bnb_block_size: 128
recipe: {recipe}
margin: 1
lora: true
lora_rank: 4
lora_alpha: 12
skip_quant_last_layers: 1
learning_rate: 1.0e-4
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUROGATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(tmp_path, text=YAML, recipe="bf16"):
    path = tmp_path / "train.yaml"
    path.write_text(text.format(recipe=recipe))
    return path


def test_quantizes_once_loads_and_adds_the_adapter(source, cache, tmp_path, caplog):
    path = write(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = from_config(path, source)
    (made,) = (entry for entry in cache.iterdir() if entry.is_dir())
    assert f"once, into {made}" in caplog.text
    assert isinstance(model, peft.PeftModel)
    settings = model.peft_config["default"]
    assert (settings.r, settings.lora_alpha) == (4, 12)
    layers = model.base_model.model.model.layers
    assert layers[0].mlp.up_proj.base_layer.kind.format.block_size == 128
    assert isinstance(layers[0].mlp.up_proj.base_layer, QuantizedLinear)
    assert not isinstance(layers[1].mlp.up_proj.base_layer, QuantizedLinear)
    ids = torch.arange(12).reshape(1, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    before = (made / "surogate.json").stat().st_mtime_ns
    caplog.clear()
    again = from_config(write(tmp_path, recipe="fp8-hybrid"), source, emulate=True, margin=3)
    assert f"using the quantized base in {made}" in caplog.text
    assert (made / "surogate.json").stat().st_mtime_ns == before
    assert again.base_model.model.model.layers[0].mlp.up_proj.base_layer.recipe.input.reach == 448 / 8


def test_the_file_names_the_model_and_the_recipe(source, tmp_path):
    path = write(tmp_path, f"model: {source}\n" + YAML, recipe="fp8-hybrid")
    with pytest.raises(UnsupportedDeviceError):
        from_config(path)
    model = from_config(path, recipe="bf16")
    assert type(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.recipe).__name__ == "Bf16"


def test_key_follows_source_format_and_layers_but_not_the_recipe(source, tmp_path):
    def key(text=YAML, recipe="bf16"):
        return cache_key(copied, load_training_config(write(tmp_path, text, recipe)))

    copied = tmp_path / "copied"
    shutil.copytree(source, copied)
    first = key()
    assert key(recipe="nvfp4") == first
    assert key(YAML.replace("lora_rank: 4", "lora_rank: 8")) == first
    assert key(YAML.replace("128", "64")) != first
    assert key(YAML.replace("last_layers: 1", "last_layers: 0")) != first
    os.utime(copied / "model.safetensors", ns=(0, 1))
    assert key() != first


def test_errors(source, cache, tmp_path):
    with pytest.raises(SourceMissingError, match="names no model"):
        from_config(write(tmp_path))
    with pytest.raises(UsageError, match="no format is on"):
        from_config(write(tmp_path, "recipe: bf16\nlora: true\n"), source)
    with pytest.raises(NoSuchSourceError, match="models/of/ours: no such directory") as caught:
        from_config(write(tmp_path, "model: models/of/ours\n" + YAML))
    assert "\n" not in str(caught.value)
    with pytest.raises(IncompatibleRecipeError, match="quantized twice"):
        from_config(write(tmp_path, recipe="nvfp4"), source)
    with pytest.raises(QuantizerFailedError, match="can't be quantized: ") as caught:
        from_config(write(tmp_path, YAML.replace("skip_quant_last_layers: 1", "skip_quant_last_layers: 2")), source)
    assert "\n" not in str(caught.value)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_a_killed_run_is_replaced_and_the_callers_recipe_counts(source, cache, tmp_path, caplog):
    path = write(tmp_path, recipe="nvfp4")  # alone it is refused on nf4
    out = cache / cache_key(source, load_training_config(path))
    (out / ".surogate-staging").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        model = from_config(path, source, recipe="bf16")
    assert type(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.recipe).__name__ == "Bf16"
    assert (out / "surogate.json").is_file()
    assert not (out / ".surogate-staging").exists()
    assert caplog.text.count("not ours, passed over: learning_rate") == 1


def adapters(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_adapter_is_the_one_that_the_file_describes(source, tmp_path):
    more = "lora_target_modules: [q_proj, v_proj]\nlora_dropout: 0.25\nlora_dtype: bf16\n"
    model = from_config(write(tmp_path, YAML + more), source)
    settings = model.peft_config["default"]
    assert (settings.target_modules, settings.lora_dropout) == ({"q_proj", "v_proj"}, 0.25)
    assert adapters(model)
    assert all("q_proj" in name or "v_proj" in name for name in adapters(model))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.bfloat16}
    kept = from_config(write(tmp_path, YAML), source)
    assert {parameter.dtype for parameter in kept.parameters() if parameter.requires_grad} == {torch.float32}
    with pytest.raises(UsageError, match=r"train\.yaml: lora_dtype bf16 needs a bf16 model"):
        from_config(write(tmp_path, YAML + more), source, dtype=torch.float32)
    with pytest.raises(UsageError, match=r"train\.yaml: lora_target_modules: .*nothing_so") as caught:
        from_config(write(tmp_path, YAML + "lora_target_modules: nothing_so\n"), source)
    assert str(caught.value).isprintable()


def test_what_means_something_but_is_not_honoured_gets_a_line_each(source, tmp_path, caplog):
    path = write(tmp_path, YAML + "lora_bias: all\nattn_implementation: eager\ntrust_remote_code: false\n")
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        model = from_config(path, source, attn_implementation="eager")
    lines = [line.removeprefix(f"{path}: ") for line in caplog.messages if line.startswith(f"{path}: ")]
    assert lines == [
        "lora_bias has no effect here: for such adapters call peft.get_peft_model yourself",
        "not ours, passed over: learning_rate, trust_remote_code",
    ]
    assert model.config._attn_implementation == "eager"
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        from_config(path, source)
    assert f"{path}: attn_implementation has no effect here: pass attn_implementation= to" in caplog.text


def test_quantizing_with_the_defaults_draws_no_warning(source, tmp_path, caplog):
    path = write(tmp_path, "qlora_fp4: true\nrecipe: bf16\n")
    for begun in ("quantizing ", "using "):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            from_config(path, source)
        assert [line.startswith(begun) for line in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("text", "difference"),
    [
        ("qlora_fp4: true", "the format is fp4 here"),
        ("qlora_bnb: true\nqlora_bnb_block_size: 128", r"qlora_bnb_block_size \(block_size\) is 128 here"),
        ("qlora_bnb: true\nqlora_bnb_double_quant: false", r"qlora_bnb_double_quant \(double_quant\) is none here"),
        ("qlora_bnb: true\nskip_quant_last_layers: 1", "skip_quant_last_layers is 1 here"),
    ],
)
def test_a_packed_model_that_is_not_what_the_file_asks_for(artifact, cache, tmp_path, text, difference):
    with pytest.raises(DifferentArtifactError, match=rf"train\.yaml: {difference}, but .* was packed with ") as caught:
        from_config(write(tmp_path, text), artifact("nf4"))
    assert str(caught.value).isprintable()
    assert not cache.exists()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("nf4", "qlora_bnb: true"),
        ("nf4-none", "qlora_bnb: true\nqlora_bnb_double_quant: false"),
        ("fp4", "qlora_fp4: true"),
        ("fp4-1d", "qlora_fp4: true\ndisable_2d_quantization: true"),
        ("fp8-channel", "qlora_fp8: true"),
        ("nf4", "margin: 0"),
    ],
)
def test_a_packed_model_that_is_what_the_file_asks_for_is_used(artifact, cache, tmp_path, kind, text):
    path = write(tmp_path, f"model: {artifact(kind)}\nlora: true\nlora_rank: 2\n{text}\n")
    model = from_config(path)
    assert model.base_model.model.model.layers[0].mlp.up_proj.base_layer.kind.format.name == KINDS[kind].name
    assert not cache.exists()


def test_errors_name_the_training_file(source, tmp_path):
    for text, error in (
        ("qlora_bnb: true\nrecipe: nvfp4\n", IncompatibleRecipeError),
        ("qlora_bnb: true\nqlora_bnb_block_size: 100\n", UsageError),
        ("lora_r: 8\n", UsageError),
        ("a: [\n", UsageError),
    ):
        with pytest.raises(error, match=rf"^{tmp_path / 'train.yaml'}: ") as caught:
            from_config(write(tmp_path, text), source)
        assert str(caught.value).isprintable()


def test_key_follows_the_version_from_a_source_tree_too(source, tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(quantized_cache, "version", missing)
    config = load_training_config(write(tmp_path))
    first = cache_key(source, config)
    monkeypatch.setattr(quantized_cache, "version", lambda name: VERSION)
    assert cache_key(source, config) == first
    monkeypatch.setattr(quantized_cache, "version", lambda name: "another")
    assert cache_key(source, config) != first
