"""An artifact to the Hub: whole or not at all, with a card; and what a fault looks like."""

import json

import pytest
from hub.server import TOKEN
from huggingface_hub import ModelCard
from quantizer.checkpoints import check_artifact, contents, write_checkpoint

from surogate_formats.artifact import Artifact
from surogate_quantize import make_options, quantize

REPO = "me/model-nf4"
WRITE = {"HF_TOKEN": TOKEN}
CARD = """---
license: other
license_name: house-rules
license_link: RULES.md
language: [en]
pipeline_tag: text-generation
tags: [theirs]
---
# The original

| a | b |
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("push") / "source")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text(CARD)
    return directory


@pytest.fixture(scope="module")
def made(source):
    out = source.parent / "artifact"
    quantize(source, out, make_options("nf4", {}, max_shard_size="100kB"))
    return out


@pytest.fixture
def artifact(made, tmp_path):
    out = tmp_path / "artifact"
    out.mkdir()
    for name, data in contents(made).items():
        (out / name).write_bytes(data)
    return out


def refused(done, status, *words):
    assert (done.returncode, done.stdout) == (status, "")
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: ")
    assert done.stderr.count("Error") == 1
    for word in words:
        assert word in error
    assert TOKEN not in done.stderr


def test_a_push_is_one_commit_of_the_artifact_and_a_card(hub, artifact, load):
    done = load("push", artifact, REPO, **WRITE)
    assert (done.returncode, done.stdout) == (0, f"{hub.url}/{REPO}\n"), done.stderr
    repo = hub.repos[REPO]
    assert len(repo.commits) == 1
    assert not repo.private
    there = dict(repo.files)
    card = there.pop("README.md")
    there.pop("quantization_errors.png", None)
    assert there == contents(artifact)
    assert b"surogate-quantize ./source --format nf4" in card
    assert TOKEN not in done.stdout + done.stderr + card.decode()


def test_a_pushed_artifact_comes_back_whole(hub, source, artifact, load, tmp_path, environment, run):
    assert load("push", artifact, REPO, **WRITE).returncode == 0
    hub.repos[REPO].private = True
    done = run("huggingface_hub.cli.hf", "download", REPO, "--local-dir", "back", **WRITE)
    assert done.returncode == 0, done.stderr
    check_artifact(source, tmp_path / "back")
    assert load("verify", "back").returncode == 0


def test_a_pushed_model_is_downloaded_and_loaded(hub, tiny, load, run, tmp_path):
    torch = pytest.importorskip("torch")
    import surogate_load

    quantize(tiny("llama"), tmp_path / "packed", make_options("nf4", {}))
    assert load("push", "packed", REPO, **WRITE).returncode == 0
    done = run("huggingface_hub.cli.hf", "download", REPO, "--local-dir", "back")
    assert done.returncode == 0, done.stderr
    ids = torch.arange(8).reshape(1, 8)
    logits = [surogate_load.load_model(tmp_path / name)(ids).logits for name in ("packed", "back")]
    assert torch.equal(*logits)


def test_private_messages_and_pull_requests(hub, artifact, load):
    done = load("push", artifact, REPO, "--private", "--commit-message", "the first", **WRITE)
    assert done.returncode == 0, done.stderr
    assert hub.repos[REPO].private
    assert hub.repos[REPO].messages == ["the first"]
    (artifact / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    done = load("push", artifact, REPO, "--create-pr", **WRITE)
    assert done.stdout == f"{hub.url}/{REPO}/discussions/1\n"
    assert "README.md: is uploaded as it is" in done.stderr
    assert len(hub.repos[REPO].commits) == 1
    ((_, files),) = hub.repos[REPO].pull_requests
    assert files["README.md"] == b"---\nlicense: mit\n---\nmine\n"


def test_a_new_artifact_replaces_the_old_one_and_leaves_other_files(hub, source, artifact, load, tmp_path):
    hub.add(REPO, {**contents(artifact), "notes.txt": b"mine", "model.safetensors.index.json": b"{}"})
    quantize(source, tmp_path / "one", make_options("fp8", {}))
    assert load("push", "one", REPO, **WRITE).returncode == 0
    files = hub.repos[REPO].files
    assert files["notes.txt"] == b"mine"
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]


def test_a_repository_with_other_weights_is_left_alone(hub, artifact, load):
    hub.add("me/dense", {"model.safetensors": b"weights", "config.json": b"{}"})
    refused(load("push", artifact, "me/dense", **WRITE), 2, "me/dense: holds model.safetensors", "choose another")
    assert len(hub.repos["me/dense"].commits) == 1
    assert hub.count("PUT|preupload") == 0


@pytest.mark.parametrize("what", ["manifest", "tensor", "sidecar"])
def test_what_is_no_whole_artifact_never_reaches_the_hub(hub, artifact, load, what):
    if what == "manifest":
        (artifact / "surogate.json").unlink()
    path = next(artifact.glob("*.safetensors")) if what == "tensor" else artifact / "config.json"
    if what != "manifest":
        data = bytearray(path.read_bytes())
        data[-2] ^= 32
        path.write_bytes(data)
    refused(load("push", artifact, REPO, **WRITE), 1, str(artifact))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("pattern", "kind", "words"),
    [
        ("POST /api/repos", "401", ("refuses the token", "--token")),
        ("preupload", "403", ("refuses the token", "write access")),
        ("PUT", "429", ("takes no more requests", "the same command again")),
        ("commit", "503", ("the Hub fails (503)", "nothing was published")),
    ],
)
def test_a_fault_is_one_line_and_publishes_nothing(hub, artifact, load, pattern, kind, words):
    hub.fail(pattern, kind)
    refused(load("push", artifact, REPO, **WRITE), 1, REPO, *words)
    assert REPO not in hub.repos or hub.repos[REPO].commits == []


def test_a_repository_that_changes_meanwhile_is_left_as_it_is(hub, artifact, load):
    hub.add(REPO, {"notes.txt": b"mine"})

    def look(line):
        if "preupload" in line and len(hub.repos[REPO].commits) == 1:
            hub.add(REPO, {"notes.txt": b"theirs"})

    hub.watch = look
    refused(load("push", artifact, REPO, **WRITE), 1, REPO, "was changed meanwhile")
    assert [files for _, files in hub.repos[REPO].commits] == [{"notes.txt": b"mine"}, {"notes.txt": b"theirs"}]


def test_without_a_token_or_an_answer(hub, artifact, load):
    for done, status, words in (
        (load("push", artifact, REPO), 1, (REPO, "no token", "--token")),
        (load("push", artifact, REPO, HF_ENDPOINT="http://127.0.0.1:9", **WRITE), 1, ("can't be reached",)),
        (load("push", artifact, REPO, HF_HUB_OFFLINE="1", **WRITE), 1, ("offline",)),
        (load("push", artifact, "a--b/c"), 2, ("a--b/c", "no name on the Hub")),
        (load("push", artifact, REPO, "--base-model", "a--b/c"), 2, ("a--b/c", "no name on the Hub")),
        (load("push", "nowhere", REPO, HF_HUB_OFFLINE="1"), 1, ("nowhere", "no such directory")),
    ):
        refused(done, status, *words)
        assert len(done.stderr.splitlines()) == 1  # no line of the card's before the error
    assert hub.requests == []


def test_a_refused_token_is_all_that_is_said(hub, artifact, load):
    done = load("push", artifact, REPO, "--token", "hf_ofSomebodyElse")
    refused(done, 1, REPO, "the Hub refuses the token", "--token")
    assert len(done.stderr.splitlines()) == 1


def test_a_push_that_broke_off_goes_on(hub, artifact, load):
    shards = len(list(artifact.glob("*.safetensors")))
    hub.fail("commit", "503", 1)
    refused(load("push", artifact, REPO, **WRITE), 1, "503")
    sent = hub.count("PUT")
    assert sent >= shards
    assert load("push", artifact, REPO, **WRITE).returncode == 0
    assert hub.count("PUT") == sent
    assert len(hub.repos[REPO].commits) == 1


def test_a_lost_part_is_sent_again_by_the_client(hub, artifact, load):
    hub.fail("PUT", "503", 1)
    assert load("push", artifact, REPO, **WRITE).returncode == 0


def test_quantize_and_push_is_one_command(hub, source, quantize, load, tmp_path):
    hub.add_directory("org/base", source)
    arguments = ("org/base", "--format", "nf4", "--out", "out", "--push-to-hub", REPO, "--private")
    done = quantize(*arguments, "--token", TOKEN, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == "out"
    assert f"pushed to {hub.url}/{REPO}" in done.stderr
    assert hub.repos[REPO].private
    card = ModelCard(hub.repos[REPO].files["README.md"].decode())
    assert card.data.base_model == "org/base"
    assert "The original" in card.text
    assert all(TOKEN.encode() not in data for data in hub.repos[REPO].files.values())


def test_a_push_that_fails_leaves_the_artifact(hub, source, quantize, tmp_path):
    hub.fail("commit", "503")
    done = quantize(source, "--format", "nf4", "--out", "out", "-q", "--push-to-hub", REPO, **WRITE)
    assert (done.returncode, done.stdout) == (1, "out\n")
    assert done.stderr.count("Error: ") == 1
    with Artifact.open(tmp_path / "out") as opened:
        opened.verify()


@pytest.mark.parametrize(
    ("arguments", "extra", "message"),
    [
        (("--private",), WRITE, "--private says how to push; add --push-to-hub REPO"),
        (("--push-to-hub", "a--b/c"), WRITE, "no name on the Hub"),
        (("--push-to-hub", REPO), {}, "no token; give --token, set HF_TOKEN"),
        (("--push-to-hub", REPO), WRITE | {"HF_HUB_OFFLINE": "1"}, "offline"),
    ],
)
def test_a_push_that_cannot_come_off_is_refused_before_the_work(
    hub, source, quantize, tmp_path, arguments, extra, message
):
    refused(quantize(source, "--format", "nf4", "--out", "out", *arguments, **extra), 2, message)
    assert not (tmp_path / "out").exists()
    assert hub.requests == []
