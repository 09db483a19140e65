"""The model card: fields as the Hub expects them, the table, the command, the readers, the source's card."""

import json
import re
import shlex
from dataclasses import replace

import pytest
import yaml
from hub.server import TOKEN
from huggingface_hub import ModelCard
from quantizer.checkpoints import contents, write_checkpoint

from surogate_formats.artifact import Artifact
from surogate_formats.format import to_dict
from surogate_formats.manifest import Manifest
from surogate_load.publishing.card import PLOT, make_card
from surogate_load.publishing.command import command_of
from surogate_load.publishing.plot import error_plot, errors_by_projection
from surogate_load.publishing.readers import how_to_load
from surogate_load.publishing.source import Base, SourceCard, base_of, parse_card
from surogate_load.readers import READERS, WITH_EXPERTS
from surogate_quantize import make_options, quantize
from surogate_quantize.cli import _options, main

SETTINGS = {
    "nf4": ("nf4", {}, "surogate"),
    "nf4-bitsandbytes": ("nf4", {"block_size": 128, "double_quant": "none"}, "bitsandbytes"),
    "fp4": ("fp4", {"two_d": False, "metric": "l1"}, "compressed-tensors"),
    "fp4-amax": ("fp4", {"global_scale": "amax"}, "compressed-tensors"),
    "fp4-modelopt": ("fp4", {"four_over_six": False}, "modelopt"),
    "fp8": ("fp8", {"scaling": "channel"}, "compressed-tensors"),
    "fp8-block": ("fp8", {"scaling": "block"}, "hf-fp8"),
    "fp8-modelopt": ("fp8", {}, "modelopt"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("card") / "source")


@pytest.fixture(scope="module")
def artifacts(source):
    def make(key):
        out = source.parent / key
        if not out.exists():
            name, parameters, layout = SETTINGS[key]
            quantize(source, out, make_options(name, parameters, layout, skip_first_layers=1, skip=("*.o_proj",)))
        return out

    return make


def card_of(path, base=None, source=None, plot=False):
    with Artifact.open(path) as opened:
        return make_card(opened, "me/packed", base, source or SourceCard(), plot=plot)


def manifest_of(path):
    return Manifest.from_json((path / "surogate.json").read_bytes(), str(path))


@pytest.mark.parametrize("key", SETTINGS)
def test_the_command_asks_for_the_same_again(artifacts, key):
    manifest = manifest_of(artifacts(key))
    program, *words = shlex.split(command_of(manifest))
    assert program == "surogate-quantize"
    arguments = main.make_context("surogate-quantize", words).params
    model, options = _options(None, arguments)
    assert model == "./source"
    assert (to_dict(options.format), options.layout.name) == (dict(manifest.format), manifest.layout)
    assert options.recorded() == manifest.options


def test_options_that_are_on_are_in_the_command(artifacts):
    manifest = manifest_of(artifacts("nf4"))
    options = {**manifest.options, "quantize_lm_head": True, "skip": ["re:a b", "x.*"], "skip_last_layers": 2}
    words = shlex.split(command_of(replace(manifest, options=options, source="org/model", revision="v 1")))
    arguments = main.make_context("surogate-quantize", words[1:]).params
    model, asked = _options(None, arguments)
    assert (model, arguments["revision"]) == ("org/model", "v 1")
    assert asked.recorded() == options


@pytest.mark.parametrize("key", SETTINGS)
def test_the_fields_are_what_the_hub_expects(artifacts, key):
    text = card_of(artifacts(key), Base("org/model", "a" * 40), SourceCard({"license": "apache-2.0"}, "theirs"))
    fields = ModelCard(text).data.to_dict()
    assert fields["base_model"] == "org/model"
    assert fields["base_model_relation"] == "quantized"
    assert fields["license"] == "apache-2.0"
    plain = key in ("nf4-bitsandbytes", "fp4", "fp4-amax", "fp8", "fp8-block")
    assert fields["library_name"] == ("transformers" if plain else "surogate-quant")
    bits = "8-bit" if key.startswith("fp8") else "4-bit"
    assert bits in fields["tags"]
    assert len(fields["tags"]) == len(set(fields["tags"]))
    assert re.match(r"---\n(.+?)\n---\n", text, re.DOTALL)
    assert yaml.safe_load(text.split("---\n")[1]) == fields


@pytest.mark.parametrize("key", SETTINGS)
def test_the_tables_are_whole_and_say_what_the_manifest_says(artifacts, key):
    manifest, text = manifest_of(artifacts(key)), card_of(artifacts(key))
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(columns) == 1, table
    records = {name: record for name, record in manifest.tensors.items() if record.decision == "quantize"}
    for name in records:
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        errors = [r.relative_error for n, r in records.items() if n.endswith(f".{leaf}.weight")]
        row = next(line for line in text.splitlines() if line.startswith(f"| {leaf} | {len(errors)} |"))
        assert f" {sum(errors) / len(errors):.4f} | {max(errors):.4f} " in row
    assert "skip-first-layers" in text
    assert manifest.format["name"] in text


def test_a_relative_licence_link_leads_to_the_source(artifacts):
    fields = {"license": "other", "license_name": "rules", "license_link": "LICENSE"}
    data = ModelCard(card_of(artifacts("nf4"), Base("org/model", "v1"), SourceCard(fields))).data
    assert data.license_link == "https://huggingface.co/org/model/blob/v1/LICENSE"
    fields["license_link"] = "https://example.org/licence"
    data = ModelCard(card_of(artifacts("nf4"), Base("org/model", None), SourceCard(fields))).data
    assert data.license_link == "https://example.org/licence"


def test_without_a_base_model_nothing_is_claimed(artifacts):
    fields = ModelCard(card_of(artifacts("nf4"))).data.to_dict()
    assert not fields.keys() & {"base_model", "base_model_relation", "license"}
    assert base_of(manifest_of(artifacts("nf4")), None) is None
    assert base_of(manifest_of(artifacts("nf4")), "org/model") == Base("org/model", None)


@pytest.mark.parametrize("content", ["", "no fields", "---\n- a\n---\ntext", "---\na: [\n---\ntext", "---\n: :\n---\n"])
def test_any_card_of_the_source_is_taken(artifacts, content):
    parsed = parse_card(content)
    assert parsed.fields == {}
    ModelCard(card_of(artifacts("nf4"), None, parsed))


def test_the_sources_card_stands_below_and_its_fields_do_not_leak(artifacts):
    content = "---\nlicense: mit\nbase_model: other/one\ntags: [theirs]\nmodel-index: 3\n---\n# Theirs\n"
    text = card_of(artifacts("nf4"), Base("org/model", None), parse_card(content))
    assert text.index("## The source's model card") < text.index("# Theirs")
    fields = ModelCard(text).data.to_dict()
    assert (fields["license"], fields["base_model"]) == ("mit", "org/model")
    assert "theirs" not in fields["tags"]


@pytest.mark.parametrize("table", [READERS, WITH_EXPERTS], ids=["dense", "experts"])
def test_no_line_loads_what_a_reader_does_not_take(table):
    config = {"architectures": ["LlamaForCausalLM"]}
    for key, own in table.items():
        readers = {**READERS[key], **own}
        text = how_to_load(readers, config, "me/packed")
        for reader, remark in readers.items():
            assert f"- {reader}" in text
            bad = remark.startswith("not ") or "wrongly" in remark
            assert (f"\n{reader}:\n" in text) is not bad, (key, reader)
            if reader == "surogate_load" and not bad:
                assert 'model = surogate_load.load_model("me/packed")' in text
            if reader == "transformers" and "surogate_load is imported" in remark and not bad:
                assert "import surogate_load\nfrom transformers" in text


def test_the_plot_has_a_point_for_every_weight(artifacts):
    manifest = manifest_of(artifacts("nf4"))
    points = sum(len(errors) for errors in errors_by_projection(manifest).values())
    assert points == sum(record.decision == "quantize" for record in manifest.tensors.values())
    assert all(list(errors) == sorted(errors) for errors in errors_by_projection(manifest).values())
    pytest.importorskip("matplotlib")
    picture = error_plot(manifest)
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert picture == error_plot(manifest)
    assert f"]({PLOT})" in card_of(artifacts("nf4"), plot=True)


def test_without_matplotlib_the_card_has_no_plot_and_a_line_says_so(hub, artifacts, load, tmp_path, environment):
    stub = tmp_path / "stub" / "matplotlib"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ImportError('not installed')")
    path = f"{stub.parent}:{environment['PYTHONPATH']}"
    done = load("push", artifacts("nf4"), "me/packed", HF_TOKEN=TOKEN, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no error plot: pip install 'surogate-quant[card]' draws one") == 1
    files = hub.repos["me/packed"].files
    assert PLOT not in files
    assert PLOT.encode() not in files["README.md"]


def test_the_source_s_card_is_taken_at_the_recorded_revision(hub, source, quantize, load, tmp_path):
    files = contents(source)
    old = hub.add("org/model", {**files, "README.md": b"---\nlicense: mit\n---\nold card\n"})
    assert quantize("org/model", "--format", "fp8", "--out", "out", "-q").returncode == 0
    hub.add("org/model", {**files, "README.md": b"---\nlicense: gpl-3.0\n---\nnew card\n"})
    assert load("push", "out", "me/packed", HF_TOKEN=TOKEN).returncode == 0
    text = hub.repos["me/packed"].files["README.md"].decode()
    assert ModelCard(text).data.license == "mit"
    assert "old card" in text
    assert f"surogate-quantize org/model --revision {old}" in text
    assert json.loads(hub.repos["me/packed"].files["surogate.json"])["revision"] == old
    hub.repos["org/model"].private = True
    hub.fail("resolve.*README", "404")
    done = load("push", "out", "me/other", HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "fresh"))
    assert done.returncode == 0, done.stderr
    assert "org/model: its model card can't be had" in done.stderr
    assert "names no licence" in done.stderr
