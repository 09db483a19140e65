"""A packed model by its name on the Hub: what a load fetches, and what a fault looks like."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from hub.server import TOKEN
from quantizer.checkpoints import contents
from runtime.artifacts import tiny_llama
from runtime.foreign import write_foreign
from runtime.test_cli import write_tokenizer

import surogate_load
from surogate_formats import hub_text
from surogate_formats.errors import SurogateError
from surogate_load.cli import main
from surogate_load.errors import NotPackedError
from surogate_quantize import make_options, quantize

NAME = "me/model-nf4"
IDS = torch.arange(8).reshape(1, 8)
USELESS = {
    "pytorch_model.bin": b"pickle",
    "training_args.pt": b"pickle",
    "modeling_custom.py": b"raise SystemExit",
    "consolidated.safetensors": b"the same again",
    "onnx/model.safetensors": b"another model",
    "checkpoint-9/trainer_state.json": b"{}",
    "README.md": b"a card",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An artifact in several shards, with a tokenizer and a licence."""
    root = tmp_path_factory.mktemp("load")
    tiny_llama().save_pretrained(root / "source")
    write_tokenizer(root / "source")
    (root / "source" / "LICENSE").write_text("free")
    (root / "source" / "additional_chat_templates").mkdir()
    (root / "source" / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    quantize(root / "source", root / "artifact", make_options("nf4", {}, max_shard_size="100kB"))
    assert len(list((root / "artifact").glob("*.safetensors"))) > 1
    return root


@pytest.fixture
def there(our_hub, made):
    """The artifact on the Hub, among files that no load needs."""
    our_hub.add_directory(NAME, made / "artifact")
    files = our_hub.repos[NAME].files
    our_hub.repos[NAME].commits.clear()
    our_hub.add(NAME, files | USELESS)
    return our_hub


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def cached(tmp_path):
    (snapshot,) = (tmp_path / "hf-cache" / "models--me--model-nf4" / "snapshots").iterdir()
    return snapshot


def test_a_name_loads_what_its_directory_loads(there, made, tmp_path):
    model = surogate_load.load_model(NAME)
    assert torch.equal(model(IDS).logits, surogate_load.load_model(made / "artifact")(IDS).logits)
    assert contents(cached(tmp_path)) == contents(made / "artifact")  # and so nothing useless
    assert model.name_or_path == NAME  # an adapter's base; the cache's path would lead nowhere elsewhere
    with surogate_load.open_artifact(NAME) as opened:
        assert opened.verify()


def test_what_is_cached_is_not_asked_for_again(there, tmp_path):
    surogate_load.load_model(NAME)
    asked = there.count("GET .*/resolve/")
    surogate_load.load_model(NAME)
    assert there.count("GET .*/resolve/") == asked


def test_offline_the_cache_is_enough_or_what_is_missing_is_named(there, made, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(hub_text.NotCachedError, match=f"^{NAME}: no such directory, and offline .*hf download {NAME}"):
        surogate_load.load_model(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    logits = surogate_load.load_model(NAME)(IDS).logits
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(there.requests)
    assert torch.equal(surogate_load.load_model(NAME)(IDS).logits, logits)
    assert len(there.requests) == asked
    shard = max(cached(tmp_path).glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(hub_text.NotCachedError, match=f"^{NAME}: offline .*{shard.name} isn't in the cache"):
        surogate_load.load_model(NAME)


def test_a_revision_and_a_token(our_hub, made, tmp_path):
    first = our_hub.add_directory(NAME, made / "artifact", private=True)
    quantize(made / "source", tmp_path / "fp8", make_options("fp8", {}))
    our_hub.add_directory(NAME, tmp_path / "fp8")
    with pytest.raises(hub_text.ModelNotFoundError, match=rf"^{NAME}: no such directory, .*a private one; .*`token`"):
        surogate_load.open_artifact(NAME)
    for revision, fmt in ((None, "fp8"), ("main", "fp8"), (first, "nf4")):
        with surogate_load.open_artifact(NAME, revision=revision, token=TOKEN) as opened:
            assert opened.artifact.format.name == fmt
    with pytest.raises(hub_text.RevisionNotFoundError, match="no revision 'v9'"):
        surogate_load.load_model(NAME, revision="v9", token=TOKEN)
    with pytest.raises(hub_text.RevisionOfDirectoryError, match="is a local directory; leave it out"):
        surogate_load.load_model(made / "artifact", revision="main")


@pytest.mark.parametrize("kind", ["ct-fp8-channel", "modelopt-nvfp4"])
def test_what_others_packed(our_hub, tmp_path, kind):
    foreign = write_foreign(tmp_path, kind)
    our_hub.add_directory("org/theirs", foreign.path)
    model, local = surogate_load.load_model("org/theirs"), surogate_load.load_model(foreign.path)
    assert torch.equal(model(IDS).logits, local(IDS).logits)


def test_a_dense_model_is_refused_before_its_weights_come(our_hub, made):
    our_hub.add_directory("org/dense", made / "source")
    message = r"^org/dense: is on the Hub, .*surogate-quantize org/dense --format nf4 --out dense-nf4 "
    with pytest.raises(NotPackedError, match=message):
        surogate_load.load_model("org/dense")
    assert not our_hub.count("safetensors$")


def test_pickles_are_refused(our_hub, made):
    config = json.loads((made / "artifact" / "config.json").read_text())
    our_hub.add("org/pickles", {"config.json": json.dumps(config).encode(), "pytorch_model.bin": b"x"})
    with pytest.raises(SurogateError, match=r"^org/pickles: .*pytorch_model\.bin"):
        surogate_load.load_model("org/pickles")
    assert not our_hub.count(r"\.bin")


@pytest.mark.parametrize(
    ("pattern", "kind", "words"),
    [
        ("api/models", "404", ("no such directory, and no such model on the Hub", "--token")),
        ("api/models", "401", ("--token",)),
        ("GET .*safetensors", "gated", ("gated; accept its conditions", "--token")),
        ("api/models", "503", ("the Hub fails (503)",)),
        ("GET .*safetensors", "403", ("the Hub refuses the token (403)", "--token")),
    ],
)
def test_a_fault_is_one_line(there, pattern, kind, words):
    there.fail(pattern, kind)
    done = run("inspect", NAME)
    assert (done.exit_code, done.stdout) == (1, ""), repr(done.exception)
    assert done.stderr.startswith(f"Error: {NAME}: ")
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_a_name_that_cannot_be_one(our_hub):
    done = run("inspect", "a--b/c")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: a--b/c: no such directory, and no name on the Hub")
    assert our_hub.requests == []


def test_a_directory_wins_over_a_repository(there, made, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "artifact", NAME)
    assert run("verify", NAME).exit_code == 0
    assert there.requests == []


def test_commands_take_a_name(there, made, load, tmp_path):
    for command in ("inspect", "verify"):
        here, local = run(command, NAME), run(command, made / "artifact")
        assert here.exit_code == 0, here.stderr
        assert here.stdout.replace(str(cached(tmp_path)), "") == local.stdout.replace(str(made / "artifact"), "")
    arguments = ("ab", "--no-chat", "--max-new-tokens", 3)
    local = run("generate", made / "artifact", *arguments)
    assert local.exit_code == 0
    there.repos[NAME].private = True
    done = load("generate", NAME, *arguments, "--token", TOKEN, "--revision", "main")
    assert (done.returncode, done.stdout) == (0, local.stdout), done.stderr
    assert TOKEN not in done.stderr
    done = load("generate", NAME, *arguments, "--revision", "v9", HF_TOKEN=TOKEN)
    assert done.returncode == 1
    assert "has no revision 'v9' on the Hub; check --revision" in done.stderr


@pytest.mark.parametrize("kind", ["nf4", "bitsandbytes", "modelopt-nvfp4"])
def test_inspect_downloads_no_tensor(our_hub, made, tmp_path, kind):
    if kind == "modelopt-nvfp4":
        path = write_foreign(tmp_path, kind).path
    else:
        path = tmp_path / kind
        layout = None if kind == "nf4" else kind
        quantize(made / "source", path, make_options("nf4", {}, layout, max_shard_size="100kB"))
    name = f"me/{path.name}"
    our_hub.add_directory(name, path, private=True)
    done = run("inspect", name, "--token", TOKEN)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == run("inspect", path).stdout
    assert not list((tmp_path / "hf-cache").rglob("*.safetensors"))
    modules = run("inspect", name, "--token", TOKEN, "--modules", "--json")
    assert modules.stdout == run("inspect", path, "--modules", "--json").stdout


def test_of_bitsandbytes_own_checkpoints_inspect_needs_the_tensors(our_hub, made, tmp_path):
    quantize(made / "source", tmp_path / "theirs", make_options("nf4", {}, "bitsandbytes"))
    (tmp_path / "theirs" / "surogate.json").unlink()
    our_hub.add_directory(NAME, tmp_path / "theirs")
    done = run("inspect", NAME)
    assert (done.exit_code, done.stdout) == (0, run("inspect", tmp_path / "theirs").stdout), done.stderr


def test_a_damaged_header_is_named_by_its_repository(our_hub, made):
    files = {path.name: path.read_bytes() for path in (made / "artifact").iterdir() if path.is_file()}
    shard = min(name for name in files if name.endswith(".safetensors"))
    our_hub.add(NAME, files | {shard: bytes(8) + files[shard][8:]})
    done = run("inspect", NAME)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {NAME}/{shard}: ")


def test_an_adapter_of_a_name_is_merged_without_a_word_about_another_base(there, tmp_path, caplog):
    import peft

    model = peft.get_peft_model(surogate_load.load_model(NAME), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.peft_config["default"].base_model_name_or_path == NAME
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    done = run("merge", NAME, tmp_path / "adapter", "--out", tmp_path / "merged")
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'merged'}\n"), repr(done.exception)
    assert "was trained on" not in caplog.text
