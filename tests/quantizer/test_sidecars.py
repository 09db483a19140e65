"""Files beside the weights: which links are followed, what stops a run before it writes, and what verify finds."""

import hashlib
import json
import os
import shutil

import pytest
from click.testing import CliRunner
from quantizer.checkpoints import contents, write_checkpoint

from surogate_formats.artifact import Artifact
from surogate_formats.artifact_checks import CorruptArtifactError
from surogate_formats.checkpoint.errors import NotARegularFileError, SymlinkedDirectoryError, UnreadableFileError
from surogate_formats.errors import CheckpointError
from surogate_quantize import dry_run, make_options, quantize
from surogate_quantize.cli import main
from surogate_quantize.sidecars import OutsideLinkError

OPTIONS = make_options("fp8", {}, max_shard_size="100kB")
FILES = {"tokenizer.json": "{}", "LICENSE": "Apache-2.0", "additional_chat_templates/tool.jinja": "{{ x }}"}


@pytest.fixture
def source(tmp_path):
    directory = write_checkpoint(tmp_path / "models" / "source")
    for name, text in FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    (tmp_path / "secret").write_text("a key")
    return directory


@pytest.fixture
def artifact(source, tmp_path):
    quantize(source, tmp_path / "out", OPTIONS)
    return tmp_path / "out"


def replace_by_link(path, target):
    path.unlink()
    path.symlink_to(target)


def linked(source):
    replace_by_link(source / "tokenizer.json", "../../secret")


def linked_absolutely(source):
    replace_by_link(source / "LICENSE", source.parent.parent / "secret")


def linked_twice(source):
    (source / "between").symlink_to("../../secret")
    replace_by_link(source / "LICENSE", "between")


def linked_template(source):
    replace_by_link(source / "additional_chat_templates/tool.jinja", "../../../secret")


def linked_folder(source):
    shutil.rmtree(source / "additional_chat_templates")
    (source.parent.parent / "t.jinja").write_text("a key")
    (source / "additional_chat_templates").symlink_to("../..")


def linked_folder_inside(source):
    (source / "additional_chat_templates").rename(source / "real")
    (source / "additional_chat_templates").symlink_to("real")


def linked_to_blobs_that_are_not_the_hubs(source):
    (source.parent.parent / "blobs").mkdir()
    (source.parent.parent / "blobs" / "0").write_text("a key")
    replace_by_link(source / "LICENSE", "../../blobs/0")


def linked_to_nothing(source):
    replace_by_link(source / "LICENSE", "nothing")


def linked_in_a_circle(source):
    replace_by_link(source / "LICENSE", "LICENSE")


def a_pipe(source):
    (source / "tokenizer.json").unlink()
    os.mkfifo(source / "tokenizer.json")


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (linked, OutsideLinkError),
        (linked_absolutely, OutsideLinkError),
        (linked_twice, OutsideLinkError),
        (linked_template, OutsideLinkError),
        (linked_folder, OutsideLinkError),
        (linked_to_blobs_that_are_not_the_hubs, OutsideLinkError),
        (linked_folder_inside, SymlinkedDirectoryError),
        (linked_to_nothing, UnreadableFileError),
        (linked_in_a_circle, UnreadableFileError),
        (a_pipe, NotARegularFileError),
    ],
)
def test_what_may_not_go_along_stops_the_run_before_it_writes(source, tmp_path, spoil, error):
    spoil(source)
    for attempt in (lambda: quantize(source, tmp_path / "out", OPTIONS), lambda: dry_run(source, OPTIONS)):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert type(caught.value) is error
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(main, [str(source), "--format", "fp8", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr == f"Error: {caught.value}\n"


def test_links_within_the_source_and_into_the_hubs_blobs_are_followed(source, tmp_path):
    replace_by_link(source / "LICENSE", "config.json")
    quantize(source, tmp_path / "local", OPTIONS)
    assert (tmp_path / "local" / "LICENSE").read_bytes() == (source / "config.json").read_bytes()
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for name in contents(source):
        blob = blobs / hashlib.sha256(name.encode()).hexdigest()
        shutil.copy(source / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        out = tmp_path / f"{path.name}-out"
        quantize(path, out, OPTIONS)
        assert (
            contents(out).items() >= {name: text.encode() for name, text in FILES.items() if name != "LICENSE"}.items()
        )
        with Artifact.open(out) as opened:
            opened.verify()
    (snapshot / "NOTICE").symlink_to("../../../secret")
    with pytest.raises(OutsideLinkError, match=r"NOTICE: a symbolic link to .*secret, outside the model's directory"):
        quantize(snapshot, tmp_path / "other", OPTIONS)


def test_the_manifest_holds_every_file_but_shards_and_itself(artifact):
    recorded = json.loads((artifact / "surogate.json").read_text())["sidecars"]
    found = {name: hashlib.sha256(data).hexdigest() for name, data in contents(artifact).items()}
    expected = {name: found[name] for name in ("config.json", "model.safetensors.index.json", *FILES)}
    assert recorded == expected
    assert all(name in expected or name.endswith(".safetensors") or name == "surogate.json" for name in found)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", *FILES])
def test_verify_finds_a_change_in_any_of_them(artifact, name):
    with (artifact / name).open("a") as file:
        file.write(" ")
    with Artifact.open(artifact) as opened, pytest.raises(CorruptArtifactError, match=f"{name} has changed since"):
        opened.verify()


def test_verify_finds_one_that_is_gone(artifact):
    (artifact / "LICENSE").unlink()
    with (
        Artifact.open(artifact) as opened,
        pytest.raises(CorruptArtifactError, match="LICENSE: missing; quantize again"),
    ):
        opened.verify()


def test_verify_takes_files_that_came_later(artifact):
    (artifact / "README.md").write_text("a card")
    with Artifact.open(artifact) as opened:
        assert opened.verify() > 0
