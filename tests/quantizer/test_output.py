"""The output directory: what is refused untouched, and what is left after a failure at any moment."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from surogate_quantize import output
from surogate_quantize.output import STAGING, check_output, staged
from surogate_quantize.output_errors import (
    DiskFullError,
    LeftoverError,
    OutputBusyError,
    OutputExistsError,
    OutputInSourceError,
    OutputNotWritableError,
)

NEW = {"model.safetensors": b"new", "config.json": b"{}", "surogate.json": b"{1}", "tokenizer.json": b"t"}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "models" / "source").mkdir(parents=True)
    return tmp_path / "models" / "source"


def write(out, files=None):
    with staged(out, 0) as staging:
        for name, data in (files or NEW).items():
            (staging / name).write_bytes(data)


def files(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("out", [".", "inside", "inside/deep", "..", "../..", "../source", "inside/.."])
def test_an_output_that_overlaps_the_source_is_refused(source, out):
    for overwrite in (False, True):
        with pytest.raises(OutputInSourceError, match="overlaps with the source"):
            check_output(source / out, source, overwrite=overwrite)


def test_a_link_to_the_source_overlaps_it(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    for path in (tmp_path / "link", tmp_path / "link" / "inside"):
        with pytest.raises(OutputInSourceError):
            check_output(path, source, overwrite=True)
    with pytest.raises(OutputInSourceError):
        check_output(source, tmp_path / "link", overwrite=True)


def test_what_may_be_written_to(source):
    (source.parent / "empty").mkdir()
    for name in ("none", "none/deep/er", "empty", "source-nf4"):
        check_output(source.parent / name, source, overwrite=False)
    assert sorted(path.name for path in source.parent.iterdir()) == ["empty", "source"]


def test_what_holds_something_is_refused_and_overwrite_takes_artifacts_alone(source):
    out = source.parent / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="is not empty"):
        check_output(out, source, overwrite=False)
    with pytest.raises(OutputExistsError, match=r"holds no surogate\.json, so `overwrite=True` won't touch it"):
        check_output(out, source, overwrite=True)
    (out / "surogate.json").write_text("{}")
    with pytest.raises(OutputExistsError, match=r"holds notes\.txt, which is no part of an artifact"):
        check_output(out, source, overwrite=True)
    (out / "notes.txt").unlink()
    check_output(out, source, overwrite=True)
    with pytest.raises(OutputExistsError, match="`overwrite=True` to replace"):
        check_output(out, source, overwrite=False)


def test_a_second_run_is_refused_while_one_writes(tmp_path):
    out = tmp_path / "out"
    with staged(out, 0) as staging:
        (staging / "model.safetensors").write_bytes(b"first")
        with pytest.raises(OutputBusyError, match="another run is writing there"), staged(out, 0):
            pass
        assert (staging / "model.safetensors").read_bytes() == b"first"
        for name in ("config.json", "surogate.json"):
            (staging / name).write_bytes(b"{}")
    assert (out / "model.safetensors").read_bytes() == b"first"


def test_a_file_or_a_dangling_link_is_refused(source):
    (source.parent / "file").write_text("mine")
    (source.parent / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(OutputExistsError, match="is not a directory"):
            check_output(source.parent / name, source, overwrite=True)


def test_an_artifact_appears_whole_and_without_its_staging_folder(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    write(out)
    assert files(out) == NEW
    assert not (out / STAGING).exists()


@pytest.mark.parametrize("existed", [0, 1, 2])
def test_a_failure_takes_away_every_directory_that_was_made_and_no_other(tmp_path, existed):
    out = tmp_path / "a" / "out"
    there = [tmp_path / "a", out][:existed]
    for directory in there:
        directory.mkdir()
    with pytest.raises(RuntimeError), staged(out, 0) as staging:
        (staging / "model.safetensors").write_bytes(b"half")
        raise RuntimeError
    assert sorted(tmp_path.rglob("*")) == there


def test_a_staging_folder_left_by_a_killed_run_is_replaced(tmp_path):
    out = tmp_path / "out"
    (out / STAGING).mkdir(parents=True)
    (out / STAGING / "model.safetensors").write_bytes(b"old")
    check_output(out, tmp_path / "source", overwrite=True)
    write(out)
    assert files(out) == NEW


def test_a_directory_of_nothing_but_leftovers_says_so(tmp_path):
    out = tmp_path / "out"
    (out / STAGING).mkdir(parents=True)
    with pytest.raises(
        LeftoverError, match=rf"holds only {STAGING}, which a run that was killed left; `overwrite=True`"
    ):
        check_output(out, tmp_path / "source", overwrite=False)
    assert (out / STAGING).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_staging_folder_that_a_run_writes_into_is_no_leftover(tmp_path, overwrite):
    out = tmp_path / "out"
    with pytest.raises(OutputBusyError), staged(out, 0):
        check_output(out, tmp_path / "source", overwrite=overwrite)


def test_overwriting_replaces_everything_and_leaves_no_old_file(tmp_path):
    out = tmp_path / "out"
    write(out, NEW | {"model-00001-of-00002.safetensors": b"old"})
    (out / "old").mkdir()
    (out / "old" / "deep").write_text("x")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").mkdir()
    write(out, NEW | {"config.json": b"[]"})
    assert files(out) == NEW | {"config.json": b"[]"}
    assert not (out / "old").exists()


def test_a_failure_before_the_end_leaves_the_old_artifact_as_it_was(tmp_path):
    out = tmp_path / "out"
    write(out)
    with pytest.raises(KeyboardInterrupt), staged(out, 0) as staging:
        (staging / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert files(out) == NEW


@pytest.mark.parametrize("moment", range(8))
def test_at_no_moment_does_a_directory_with_a_manifest_mix_two_artifacts(tmp_path, monkeypatch, moment):
    """A crash after any one operation of publishing: what is complete is the old artifact or the new one."""
    out = tmp_path / "out"
    old = dict.fromkeys(NEW, b"old")
    write(out, old)
    calls = 0

    def dies(method):
        def call(self, *arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls > moment and STAGING not in self.name:
                raise SystemExit
            return method(self, *arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies(Path.unlink))
        patch.setattr(Path, "replace", dies(Path.replace))
        patch.setattr(shutil, "rmtree", lambda *arguments, **keywords: None)
        try:
            write(out)
        except SystemExit:
            present = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
            if "surogate.json" in present:
                assert present in (old, NEW)
            if "config.json" in present and present["config.json"] == NEW["config.json"]:
                assert {name for name in present if present[name] != NEW[name]} <= {"surogate.json"}
        else:
            assert moment >= 6


def no_room_for_the_config(monkeypatch):
    replace = Path.replace

    def fails(self, target):
        if self.name == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails)


@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_while_publishing_a_new_artifact_leaves_nothing(tmp_path, monkeypatch, existed):
    out = tmp_path / "a" / "out"
    if existed:
        out.mkdir(parents=True)
    no_room_for_the_config(monkeypatch)
    with pytest.raises(DiskFullError):
        write(out)
    assert sorted(tmp_path.rglob("*")) == ([tmp_path / "a", out] if existed else [])


def test_a_failure_while_publishing_over_an_artifact_can_be_repaired_by_the_same_command(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, dict.fromkeys(NEW, b"old"))
    with monkeypatch.context() as patch:
        no_room_for_the_config(patch)
        with pytest.raises(DiskFullError):
            write(out)
    assert not (out / "surogate.json").exists()
    check_output(out, tmp_path / "source", overwrite=True)
    write(out)
    assert files(out) == NEW


def test_a_parent_in_the_way_that_someone_else_fills_meanwhile_stays(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "a" / "out", 0):
        (tmp_path / "a" / "mine").touch()
        raise RuntimeError
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "mine"]


def test_a_directory_that_may_not_be_looked_into(source, monkeypatch):
    def refuses(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuses)
    with pytest.raises(OutputNotWritableError, match=r"^`out` .*: Permission denied; choose another"):
        check_output(source.parent / "out", source, overwrite=False)


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.ENOSPC, DiskFullError, "the disk is full"),
        (errno.EDQUOT, DiskFullError, "the disk is full"),
        (errno.EACCES, OutputNotWritableError, "Permission denied"),
        (errno.EROFS, OutputNotWritableError, "Read-only file system"),
        (errno.EIO, OutputNotWritableError, "Input/output error"),
    ],
)
def test_what_the_disk_says_is_one_line_and_leaves_nothing(tmp_path, code, error, message):
    out = tmp_path / "out"
    with pytest.raises(error, match=f"^`out` .*{message}"), staged(out, 0):
        raise OSError(code, os.strerror(code))
    assert not out.exists()


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=999_999_999)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    out = tmp_path / "out"
    with pytest.raises(DiskFullError, match=r"1\.00 GB will be written, 1\.00 GB are free"), staged(out, 10**9):
        pytest.fail("the block was entered")
    assert not out.exists()
    with staged(out, 999_999_999) as staging:
        for name in ("config.json", "surogate.json"):
            (staging / name).touch()


def test_an_output_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputNotWritableError, match="Not a directory"), staged(tmp_path / "file" / "out", 0):
        pytest.fail("the block was entered")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_whose_parent_cannot_be_made_names_it(tmp_path):
    (tmp_path / "link").symlink_to("nowhere/at/all")
    message = rf"`out` .*link/deep/out: {tmp_path}/link can't be made \(File exists\); choose another directory"
    with pytest.raises(OutputNotWritableError, match=message), staged(tmp_path / "link" / "deep" / "out", 0):
        pytest.fail("the block was entered")
