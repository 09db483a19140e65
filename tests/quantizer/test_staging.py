"""The staging folder: what is left after a failure at any moment, and who goes on with it."""

import errno
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from surogate_formats.artifact import STAGING
from surogate_quantize import staging as staging_module
from surogate_quantize.output import check_output
from surogate_quantize.output_errors import DiskFullError, OtherRunError, OutputBusyError, OutputNotWritableError
from surogate_quantize.run_identity import difference
from surogate_quantize.staging import Staging, staged

NEW = {"model.safetensors": b"new", "config.json": b"{}", "surogate.json": b"{1}", "tokenizer.json": b"t"}
ONE = {"format": {"name": "nf4", "block_size": 64}}
OTHER = {"format": {"name": "nf4", "block_size": 128}}


@contextmanager
def enter(out, identity=ONE, *, overwrite=False):
    staging = Staging(out, 3)
    with staged(staging, identity, overwrite=overwrite):
        yield staging


def write(out, files=None):
    with enter(out) as staging:
        for name, data in (files or NEW).items():
            (staging.files / name).write_bytes(data)
        (staging.records / "00001.json").write_text("{}")


def interrupt(out, identity=ONE, shards=2, *, overwrite=False):
    with pytest.raises(KeyboardInterrupt) as interrupted, enter(out, identity, overwrite=overwrite) as staging:
        for number in range(1, shards + 1):
            (staging.files / f"model-{number:05d}-of-00003.safetensors").write_bytes(b"done")
            (staging.records / f"{number:05d}.json").write_text("{}")
        (staging.files / "model-00003-of-00003.safetensors.part").write_bytes(b"half")
        (staging.files / "tokenizer.json").write_bytes(b"{}")
        raise KeyboardInterrupt
    return interrupted.value


def files(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_second_run_is_refused_while_one_writes(tmp_path):
    out = tmp_path / "out"
    with enter(out) as staging:
        (staging.files / "model.safetensors").write_bytes(b"first")
        with pytest.raises(OutputBusyError, match="another run is writing there"), enter(out):
            pass
        assert (staging.files / "model.safetensors").read_bytes() == b"first"
        for name in ("config.json", "surogate.json"):
            (staging.files / name).write_bytes(b"{}")
    assert (out / "model.safetensors").read_bytes() == b"first"


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
    with pytest.raises(RuntimeError), enter(out) as staging:
        (staging.files / "model.safetensors").write_bytes(b"half")
        raise RuntimeError
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_staging_folder_that_a_run_writes_into_is_no_leftover(tmp_path, overwrite):
    out = tmp_path / "out"
    with pytest.raises(OutputBusyError), enter(out):
        check_output(out, tmp_path / "source", overwrite=overwrite)


def test_overwriting_replaces_the_artifact_whole_and_nothing_else(tmp_path):
    """A file of somebody's that came while the run was going on stays."""
    out = tmp_path / "out"
    write(out, NEW | {"model-00001-of-00002.safetensors": b"old"})
    (out / "adapter-init").mkdir()
    (out / "adapter-init" / "adapter_config.json").write_text("x")
    (out / "thesis.tex").write_text("mine")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").mkdir()
    write(out, NEW | {"config.json": b"[]"})
    assert files(out) == NEW | {"config.json": b"[]", "thesis.tex": b"mine"}
    assert not (out / "adapter-init").exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_what_somebody_put_there_meanwhile(tmp_path, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(KeyboardInterrupt), enter(out) as staging:
        (staging.files / "model.safetensors").write_bytes(b"half")
        (out / "thesis.tex").write_text("mine")
        raise KeyboardInterrupt
    assert files(out) == {"thesis.tex": b"mine"}


def test_a_failure_before_the_end_leaves_the_old_artifact_as_it_was(tmp_path):
    out = tmp_path / "out"
    write(out)
    with pytest.raises(KeyboardInterrupt), enter(out) as staging:
        (staging.files / "model.safetensors").write_bytes(b"half")
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

    with monkeypatch.context() as patch, suppress(SystemExit), enter(out) as staging:
        for name, data in NEW.items():
            (staging.files / name).write_bytes(data)
        (staging.records / "00001.json").write_text("{}")
        patch.setattr(Path, "unlink", dies(Path.unlink))
        patch.setattr(Path, "replace", dies(Path.replace))
        patch.setattr(shutil, "rmtree", lambda *arguments, **keywords: None)
    present = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    if "surogate.json" in present:
        assert present in (old, NEW)
    if "config.json" in present and present["config.json"] == NEW["config.json"]:
        assert {name for name in present if present[name] != NEW[name]} <= {"surogate.json"}
    assert (present == NEW) == (calls <= moment)


def no_room_for_the_config(monkeypatch):
    replace = Path.replace

    def fails(self, target):
        if self.name == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails)


@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_while_publishing_is_repaired_by_the_same_command(tmp_path, monkeypatch, existed):
    out = tmp_path / "out"
    shard = "model-00001-of-00003.safetensors"
    new = {shard: b"new", **{name: NEW[name] for name in NEW if name != "model.safetensors"}}
    if existed:
        write(out, dict.fromkeys([*NEW, shard], b"old"))
    with monkeypatch.context() as patch:
        no_room_for_the_config(patch)
        with pytest.raises(DiskFullError, match="1 of 3 shards are finished, and the same command goes on"):
            write(out, new)
    assert not {"config.json", "surogate.json"} & {path.name for path in out.iterdir()}
    assert (out / shard).read_bytes() == b"new"
    check_output(out, tmp_path / "source", overwrite=False)
    with enter(out) as staging:
        assert files(staging.files) == {shard: b"new"}
        for name in new.keys() - {shard}:
            (staging.files / name).write_bytes(new[name])
    assert files(out) == new


def test_old_shards_that_a_publication_was_about_to_replace_are_not_taken_for_new_ones(tmp_path, monkeypatch):
    out = tmp_path / "out"
    old = ["model-00001-of-00003.safetensors", "model-00001-of-00004.safetensors"]
    write(out, dict.fromkeys([*NEW, *old], b"old"))

    def dies(entries):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit), enter(out) as staging:
        (staging.files / old[0]).write_bytes(b"new")
        (staging.records / "00001.json").write_text("{}")
        for name in ("config.json", "surogate.json"):
            (staging.files / name).write_bytes(b"{}")
        patch.setattr(staging_module, "remove", dies)
    with enter(out) as staging:
        assert files(staging.files) == {old[0]: b"new"}
        assert [entry.name for entry in out.iterdir()] == [STAGING]
        for name in ("config.json", "surogate.json"):
            (staging.files / name).write_bytes(b"{}")


def test_what_is_interrupted_stays_and_the_same_command_goes_on(tmp_path):
    out = tmp_path / "a" / "out"
    assert interrupt(out).args == ("2 of 3 shards are finished, and the same command goes on from there",)
    check_output(out, tmp_path / "source", overwrite=False)
    with enter(out) as staging:
        assert sorted(path.name for path in staging.files.iterdir()) == [
            f"model-{number:05d}-of-00003.safetensors" for number in (1, 2)
        ]
        assert len(list(staging.records.iterdir())) == 2
        for name, data in NEW.items():
            (staging.files / name).write_bytes(data)
    assert files(out).keys() == NEW.keys() | {f"model-{number:05d}-of-00003.safetensors" for number in (1, 2)}


def test_without_a_finished_shard_nothing_stays(tmp_path):
    assert interrupt(tmp_path / "a" / "out", shards=0).args == ()
    assert not (tmp_path / "a").exists()


def test_another_command_is_refused_and_the_difference_named(tmp_path):
    out = tmp_path / "out"
    interrupt(out)
    before = files(out)
    with pytest.raises(OtherRunError, match=r"\(format\.block_size 64 there, 128 here\); give that command again"):
        enter(out, OTHER).__enter__()
    assert files(out) == before
    with enter(out, OTHER, overwrite=True) as staging:
        assert not files(staging.files)
        for name, data in NEW.items():
            (staging.files / name).write_bytes(data)
    assert files(out) == NEW


@pytest.mark.parametrize("run", [None, b"", b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_an_unfinished_run_that_cannot_be_read_is_not_gone_on_with(tmp_path, run):
    out = tmp_path / "out"
    interrupt(out)
    if run is None:
        (out / STAGING / "run.json").unlink()
    else:
        (out / STAGING / "run.json").write_bytes(run)
    with pytest.raises(OtherRunError, match="which one can't be read"):
        enter(out).__enter__()
    interrupt(out, shards=0, overwrite=True)
    assert not list(out.iterdir())


def test_a_kill_before_the_first_shard_leaves_nothing_that_stands_in_the_way(tmp_path):
    out = tmp_path / "out"
    (out / STAGING / "files").mkdir(parents=True)
    (out / STAGING / "files" / "model.safetensors").write_bytes(b"half")
    check_output(out, tmp_path / "source", overwrite=False)
    write(out)
    assert files(out) == NEW


def test_an_unfinished_run_over_an_artifact_leaves_it_as_it_was(tmp_path):
    out = tmp_path / "out"
    write(out, dict.fromkeys(NEW, b"old"))
    interrupt(out)
    assert {name: (out / name).read_bytes() for name in NEW} == dict.fromkeys(NEW, b"old")
    write(out)
    assert (out / "config.json").read_bytes() == NEW["config.json"]


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": {"b": [1]}}, {"a": {"b": [2]}}, "a.b [1] there, [2] here"),
        ({"a": 1, "b": 2}, {"a": 1}, "b 2 there, nothing here"),
        ({"a": {}}, {"a": {"b": 1}, "c": 2}, "a.b nothing there, 1 here"),
    ],
)
def test_the_first_difference(before, now, words):
    assert difference(before, now) == words


def test_a_parent_in_the_way_that_someone_else_fills_meanwhile_stays(tmp_path):
    with pytest.raises(RuntimeError), enter(tmp_path / "a" / "out"):
        (tmp_path / "a" / "mine").touch()
        raise RuntimeError
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "mine"]


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
    with pytest.raises(error, match=f"^`out` .*{message}"), enter(out):
        raise OSError(code, os.strerror(code))
    assert not out.exists()


def test_too_little_room_is_seen_and_nothing_is_left(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=999_999_999)
    monkeypatch.setattr(staging_module.shutil, "disk_usage", lambda path: usage)
    out = tmp_path / "out"
    with pytest.raises(DiskFullError, match=r"1\.00 GB will be written, 1000\.0 MB are free"), enter(out) as staging:
        staging.check_room(10**9)
    assert not out.exists()
    with pytest.raises(RuntimeError), enter(out) as staging:
        staging.check_room(999_999_999)
        raise RuntimeError


def test_an_output_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputNotWritableError, match="Not a directory"), enter(tmp_path / "file" / "out"):
        pytest.fail("the block was entered")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_whose_parent_cannot_be_made_names_it(tmp_path):
    (tmp_path / "link").symlink_to("nowhere/at/all")
    message = rf"`out` .*link/deep/out: {tmp_path}/link can't be made \(File exists\); choose another directory"
    with pytest.raises(OutputNotWritableError, match=message), enter(tmp_path / "link" / "deep" / "out"):
        pytest.fail("the block was entered")
