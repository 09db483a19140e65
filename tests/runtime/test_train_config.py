"""from_config: a training file becomes a model that trains; the base is quantized once."""

import logging
import os
import shutil
from importlib.metadata import PackageNotFoundError

import peft
import pytest
import torch
from runtime.artifacts import tiny_llama

from surogate_formats.errors import UsageError
from surogate_formats.recipe import IncompatibleRecipeError
from surogate_formats.training_config import load_training_config
from surogate_formats.version import VERSION
from surogate_load import from_config, train_config
from surogate_load.errors import QuantizerFailedError, SourceMissingError, UnsupportedDeviceError
from surogate_load.linear import QuantizedLinear
from surogate_load.train_config import cache_key

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
    with pytest.raises(QuantizerFailedError, match="hf download Qwen/Nothing --local-dir") as caught:
        from_config(write(tmp_path, "model: Qwen/Nothing\n" + YAML))
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


def test_key_follows_the_version_from_a_source_tree_too(source, tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(train_config, "version", missing)
    config = load_training_config(write(tmp_path))
    first = cache_key(source, config)
    monkeypatch.setattr(train_config, "version", lambda name: VERSION)
    assert cache_key(source, config) == first
    monkeypatch.setattr(train_config, "version", lambda name: "another")
    assert cache_key(source, config) != first
