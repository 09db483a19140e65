"""`--quantize-lm-head`: what it writes, and one line where a layout, a model or another option is against it."""

import json

import pytest
from click.testing import CliRunner
from quantizer.checkpoints import CONFIG, llama, write_checkpoint

from surogate_formats.artifact import Artifact
from surogate_quantize import make_options, quantize
from surogate_quantize.cli import main
from surogate_quantize.packed_heads import PackedHeadError
from surogate_quantize.run import dry_run

UNTIED = {**CONFIG, "tie_word_embeddings": False}
ALLOWED = {
    "nf4": ("nf4", {}, None),
    "fp4": ("fp4", {}, None),
    "fp4-1d": ("fp4", {"two_d": False}, None),
    "fp4-modelopt": ("fp4", {}, "modelopt"),
    "fp8-tensor": ("fp8", {}, None),
    "fp8-channel": ("fp8", {"scaling": "channel"}, None),
    "fp8-modelopt": ("fp8", {}, "modelopt"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "llama", config=UNTIED)


def options(format_name="nf4", parameters=None, layout=None, **others):
    return make_options(format_name, parameters or {}, layout, quantize_lm_head=True, **others)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def kept_in(config):
    keys = ("modules_to_not_convert", "ignore", "llm_int8_skip_modules")
    return next(config[key] for key in keys if key in config)


@pytest.mark.parametrize("case", ALLOWED)
def test_the_head_is_packed_recorded_and_in_no_list_of_what_is_kept(case, source, tmp_path):
    name, parameters, layout = ALLOWED[case]
    quantize(source, tmp_path / "out", options(name, parameters, layout), device="cpu", workers=1)
    quantize(source, tmp_path / "plain", make_options(name, parameters, layout), device="cpu", workers=1)
    with Artifact.open(tmp_path / "out") as artifact, Artifact.open(tmp_path / "plain") as plain:
        assert artifact.modules.keys() - plain.modules.keys() == {"lm_head"}
        assert artifact.manifest.options["quantize_lm_head"] is True
        assert plain.manifest.options["quantize_lm_head"] is False
        record = artifact.manifest.tensors["lm_head.weight"]
        assert (record.decision, record.reason) == ("quantize", "lm_head, as asked")
        assert 0 < record.relative_error < 0.2
        assert plain.manifest.tensors["lm_head.weight"].decision == "keep"
        assert "lm_head" not in kept_in(artifact.quantization_config)
        assert "lm_head" in kept_in(plain.quantization_config)
        assert "model.embed_tokens" in kept_in(artifact.quantization_config)
        assert artifact.verify() == len(artifact.checkpoint.tensors)
        others = artifact.manifest.tensors.keys() - {"lm_head.weight"}
        same = [artifact.manifest.tensors[other] == plain.manifest.tensors[other] for other in others]
        assert all(same)  # in fp4 and fp8, too: the head shares no scale with anything


def test_compressed_tensors_names_the_head_since_its_readers_match_it_by_name(source, tmp_path):
    quantize(source, tmp_path / "out", options("fp4"), device="cpu", workers=1)
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear", "lm_head"]
    plain, _ = dry_run(source, make_options("fp4", {}))
    config = plain.options.layout.quantization_config(plain.options.format, [])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    _, warned = dry_run(source, options("fp4"))
    assert any("SGLang" in line and "the head is packed" in line for line in warned)


def test_the_command_and_its_dry_run(source, tmp_path):
    shown = run(source, "--format", "nf4", "--quantize-lm-head", "--dry-run", "--json")
    assert shown.exit_code == 0, shown.stderr
    row = json.loads(shown.stdout)["tensors"]["lm_head.weight"]
    assert (row["decision"], row["reason"]) == ("quantize", "lm_head, as asked")
    text = run(source, "--format", "nf4", "--quantize-lm-head", "--dry-run").stdout
    assert "lm_head, as asked" in text
    done = run(source, "--format", "nf4", "--quantize-lm-head", "--out", tmp_path / "out", "-q")
    assert done.exit_code == 0, done.stderr
    with Artifact.open(tmp_path / "out") as artifact:
        assert "lm_head" in artifact.modules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fp8", "--scaling", "block"], "--quantize-lm-head with layout hf-fp8: vLLM and SGLang take the head for"),
        (["nf4", "--layout", "bitsandbytes"], "--quantize-lm-head with layout bitsandbytes: vLLM and SGLang take"),
        (
            ["nf4", "--skip", "lm_head"],
            "--quantize-lm-head: lm_head.weight can't be quantized (matches --skip lm_head)",
        ),
    ],
)
def test_what_is_refused_is_refused_by_name(arguments, message, source):
    found = run(source, "--format", *arguments, "--quantize-lm-head", "--dry-run")
    assert found.exit_code == 2
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


def test_layouts_are_refused_before_the_source_is_read():
    with pytest.raises(PackedHeadError, match="layout hf-fp8"):
        options("fp8", {"scaling": "block"})


MODELS = {
    "tied, and stored once": (llama(tied=True), {"tie_word_embeddings": True}, "no head of its own"),
    "tied, though stored twice": (llama(), {"tie_word_embeddings": True}, "no head of its own"),
    "nothing is stored": (llama(tied=True), {"tie_word_embeddings": False}, "no head of its own"),
    "nobody says": (llama(), {}, "config.json has no tie_word_embeddings.*lm_head"),
    "tied in the text model": (llama(), {"text_config": {"tie_word_embeddings": True}}, "no head of its own"),
    "two heads": (
        {**llama(), "head.weight": llama()["lm_head.weight"]},
        {"tie_word_embeddings": False},
        r"several heads \(head\.weight, lm_head\.weight\)",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_without_one_head_of_their_own(case, tmp_path):
    tensors, config, message = MODELS[case]
    path = write_checkpoint(tmp_path / "model", tensors, config={**CONFIG, **config})
    with pytest.raises(PackedHeadError, match=message) as caught:
        dry_run(path, options())
    assert "\n" not in str(caught.value)


def test_a_head_that_the_format_can_not_take(tmp_path):
    tensors = {**llama(), "lm_head.weight": llama()["lm_head.weight"][:, :120]}
    path = write_checkpoint(tmp_path / "model", tensors, config=UNTIED)
    with pytest.raises(PackedHeadError, match=r"lm_head\.weight can't be quantized \(.*16"):
        dry_run(path, options("fp4"))


def test_a_hidden_layer_of_the_head_is_no_head(tmp_path):
    dense = {"lm_head.dense.weight": llama()["lm_head.weight"]}
    path = write_checkpoint(tmp_path / "model", {**llama(), **dense}, config=UNTIED)
    plan, _ = dry_run(path, options())
    decided = {tensor.info.name: tensor.decision for tensor in plan.tensors}
    assert decided["lm_head.weight"].quantize
    assert not decided["lm_head.dense.weight"].quantize
