"""An adapter that started from the one of its artifact, for the dense model: what training has changed, and no more."""

import hashlib
import json
import logging
from dataclasses import replace

import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from runtime.artifacts import tiny_llama, write_artifact
from runtime.layers import KINDS

from surogate_formats.artifact import ADAPTER
from surogate_formats.manifest import Manifest
from surogate_load.cli import main
from surogate_load.errors import ExportExistsError, UnreadableAdapterError
from surogate_load.export.adapter_change import export_adapter
from surogate_load.loading import load_model
from surogate_load.lora_factors import NotPlainAdapterError, read_factors

IDS = torch.arange(24).reshape(2, 12)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapter(path, folder, seed, **settings):
    """A random adapter on an artifact, saved as PEFT saves one that was trained there."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False, **settings})
    get_peft_model(load_model(path, dtype=torch.float32), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = write_artifact(tiny_llama(), tmp_path_factory.mktemp("export"), KINDS["nf4"])
    adapter(path, path / ADAPTER, 0)
    return path


@pytest.fixture
def trained(artifact, tmp_path):
    return adapter(artifact, tmp_path / "trained", 1)


def dense(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent / "dense", dtype=torch.float32)


def changed(path, last):
    """The dense model with the products of the last adapter added and those of the first subtracted."""
    model = dense(path)
    for sign, folder in ((1, last), (-1, path / ADAPTER)):
        for module, factors in read_factors(folder).items():
            model.get_submodule(module).weight.data += sign * factors.scale * factors.b @ factors.a
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("settings", "rank", "alpha"),
    [
        ({}, 8, 16),
        ({"r": 6, "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.*.down_proj": 3}}, 10,
         80 / 6**0.5),
        ({"target_modules": [*TARGETS, "o_proj", "lm_head"]}, 8, 16),
    ],
    ids=["as-it-started", "other-ranks", "more-modules"],
)  # fmt: skip
def test_on_the_dense_model_it_is_what_training_has_changed(artifact, tmp_path, settings, rank, alpha):
    last = adapter(artifact, tmp_path / "trained", 1, **settings)
    assert export_adapter(artifact, last, tmp_path / "out") == tmp_path / "out"
    model = PeftModel.from_pretrained(dense(artifact), str(tmp_path / "out"))
    expected = logits(changed(artifact, last))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert (logits(dense(artifact)) - expected).abs().max() > 0.1
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (rank, pytest.approx(alpha))
    assert config.base_model_name_or_path == "dense"


def test_matrices_are_copied_where_both_have_one_scale(artifact, trained, tmp_path):
    written = read_factors(export_adapter(artifact, trained, tmp_path / "out"))
    first, last = read_factors(artifact / ADAPTER), read_factors(trained)
    for module, factors in written.items():
        assert torch.equal(factors.a, torch.cat([last[module].a, first[module].a]))
        assert torch.equal(factors.b, torch.cat([last[module].b, -first[module].b], 1))


def test_what_can_not_be_exported(artifact, trained, tmp_path):
    cases = [
        (adapter(artifact, tmp_path / "less", 1, target_modules=["q_proj"]), UnreadableAdapterError, "has nothing for"),
        (adapter(artifact, tmp_path / "dora", 1, use_dora=True), NotPlainAdapterError, "use_dora=True"),
        (tmp_path / "nowhere", UnreadableAdapterError, "no adapter_config.json"),
    ]
    for folder, error, message in cases:
        with pytest.raises(error, match=message):
            export_adapter(artifact, folder, tmp_path / "out")
    with pytest.raises(ExportExistsError):
        export_adapter(artifact, trained, tmp_path)
    plain = write_artifact(tiny_llama(), tmp_path, KINDS["nf4"])
    with pytest.raises(UnreadableAdapterError, match="came with no adapter"):
        export_adapter(plain, trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_initial_adapter_that_training_was_saved_over_is_found_out(artifact, trained, tmp_path):
    path = write_artifact(tiny_llama(), tmp_path, KINDS["nf4"])
    file = adapter(path, path / ADAPTER, 0) / "adapter_model.safetensors"
    manifest = Manifest.from_json((path / "surogate.json").read_bytes(), "x")
    name, digest = f"{ADAPTER}/{file.name}", hashlib.sha256(file.read_bytes()).hexdigest()
    (path / "surogate.json").write_text(replace(manifest, sidecars={**manifest.sidecars, name: digest}).to_json())
    export_adapter(path, trained, tmp_path / "out")
    adapter(path, path / ADAPTER, 5)
    with pytest.raises(UnreadableAdapterError, match="isn't the adapter that the artifact came with any more"):
        export_adapter(path, trained, tmp_path / "other")


def test_on_dense_weights_alone_loading_warns(artifact, trained, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "surogate_load")
    exported = export_adapter(artifact, trained, tmp_path / "out")
    PeftModel.from_pretrained(load_model(artifact, dtype=torch.float32), str(artifact / ADAPTER))
    PeftModel.from_pretrained(load_model(artifact, dtype=torch.float32), str(trained))
    PeftModel.from_pretrained(dense(artifact), str(exported))
    assert caplog.text == ""
    PeftModel.from_pretrained(dense(artifact), str(artifact / ADAPTER))
    assert caplog.text.count("makes up for the error of packed weights, and these aren't packed") == 1
    caplog.clear()
    PeftModel.from_pretrained(dense(artifact), str(trained))
    assert caplog.text.count("if it started from adapter-init, surogate-load export-adapter") == 1


def test_the_command(artifact, trained, tmp_path):
    arguments = ["export-adapter", str(artifact), str(trained), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(main, arguments)
    assert (found.exit_code, found.stdout) == (0, f"{tmp_path / 'out'}\n"), found.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8
    again = CliRunner().invoke(main, arguments)
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
