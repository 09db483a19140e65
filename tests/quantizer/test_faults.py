"""What a machine can do to a run: one line, finished shards kept, and the same command goes on once it is mended."""

import contextlib
import errno
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from quantizer.checkpoints import contents, llama, write_checkpoint

from surogate_formats.artifact import STAGING
from surogate_formats.checkpoint.errors import ChangedFileError, TruncatedFileError, UnreadableFileError
from surogate_quantize import engine, job, make_options, quantize, shard
from surogate_quantize.bands import OutOfMemoryError
from surogate_quantize.cli import main
from surogate_quantize.output_errors import DiskFullError, OtherRunError, OutputNotWritableError

OPTIONS = make_options("nf4", {}, max_shard_size="100KB")
KEPT = r"(?P<done>\d) of 3 shards are finished, and the same command goes on from there$"


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source", llama(), shards=3)


@pytest.fixture
def expected(source, tmp_path):
    quantize(source, tmp_path / "expected", OPTIONS)
    return contents(tmp_path / "expected")


def after_a_shard(out, action):
    """A watch that calls `action` once, when the first shard is finished and the second has just been begun."""
    records, done = out / STAGING / "shards", []

    def step(tensor):
        if tensor.shard == 1 and not done:
            done.append(tensor)
            for _ in range(60_000):  # another thread is about to
                if list(records.glob("*.json")):
                    break
                time.sleep(0.001)
            action()

    def watch(plan, todo):
        return step

    return watch


def goes_on(source, out, error, expected):
    """The error says how many shards are finished, and the same call makes the rest."""
    done = int(re.search(KEPT, str(error.value))["done"])
    assert "\n" not in str(error.value)
    assert done >= 1
    assert quantize(source, out, OPTIONS).reused_shards == done
    assert contents(out) == expected


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system of a fixed size can't be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_already(source, small_disk):
    (small_disk / "filler").write_bytes(bytes(900_000))
    with pytest.raises(DiskFullError, match=r"kB will be written, .* kB are free; choose another disk$"):
        quantize(source, small_disk / "out", OPTIONS)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_up_meanwhile(source, expected, small_disk, monkeypatch):
    """For real: somebody else takes the rest of a small file system, and gives it back."""
    monkeypatch.setattr(job, "ROOM_EACH", 0)
    out, filler = small_disk / "out", small_disk / "filler"

    def fill():
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with pytest.raises(DiskFullError, match="the disk is full; free some space") as full:
        quantize(source, out, OPTIONS, watch=after_a_shard(out, fill))
    filler.unlink()
    goes_on(source, out, full, expected)


@pytest.mark.parametrize(("holder", "name"), [(os, "pwrite"), (os, "fsync"), (Path, "replace")], ids=str)
def test_a_disk_that_says_that_it_is_full(source, expected, tmp_path, monkeypatch, holder, name):
    """Where none can be mounted: no room for a payload, for what the system had put off, or for a name."""

    def fails(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        watch = after_a_shard(out, lambda: patch.setattr(holder, name, fails))
        with pytest.raises(DiskFullError, match="the disk is full; free some space") as full:
            quantize(source, out, OPTIONS, watch=watch)
    goes_on(source, out, full, expected)


def test_a_disk_that_was_too_small_from_the_first_byte_on(source, small_disk, monkeypatch):
    monkeypatch.setattr("surogate_quantize.staging.Staging.check_room", lambda staging, needed: None)
    (small_disk / "filler").write_bytes(bytes((1 << 20) - 4 * 4096))
    with pytest.raises(DiskFullError, match="the disk is full"):
        quantize(source, small_disk / "out", OPTIONS)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_read_only_disk(source, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputNotWritableError, match=r"Read-only file system; choose another directory$"):
        quantize(source, small_disk / "out", OPTIONS)


def test_a_source_on_a_disk_that_fails(source, expected, tmp_path, monkeypatch):
    def fails(descriptor, buffers, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        watch = after_a_shard(out, lambda: patch.setattr(os, "preadv", fails))
        with pytest.raises(
            UnreadableFileError, match="Input/output error; check its permissions and the disk"
        ) as error:
            quantize(source, out, OPTIONS, watch=watch)
    goes_on(source, out, error, expected)


def touch(path):
    os.utime(path, ns=(1, 1))


def append(path):
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [touch, append])
def test_a_source_that_changes_while_it_is_read(source, tmp_path, change):
    out = tmp_path / "made" / "out"
    watch = after_a_shard(out, lambda: change(source / "model-00002-of-00003.safetensors"))
    message = r"model-00002-of-00003.safetensors: (was|has) changed while it was read; run it again"
    with pytest.raises(ChangedFileError, match=message):
        quantize(source, out, OPTIONS, watch=watch)
    assert not out.parent.exists()


def test_a_source_that_is_cut_off_while_it_is_read(source, tmp_path):
    out = tmp_path / "out"

    def cut(plan, todo):
        os.truncate(source / "model-00003-of-00003.safetensors", 5000)
        return lambda tensor: None

    with pytest.raises((TruncatedFileError, ChangedFileError)):
        quantize(source, out, OPTIONS, watch=cut)
    assert not out.exists()


def test_a_source_that_has_changed_since_is_another_run(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, OPTIONS, watch=after_a_shard(out, interrupt))
    os.utime(source / "model-00001-of-00003.safetensors", ns=(5, 5))
    with pytest.raises(OtherRunError, match=r"files\.model-00001-of-00003\.safetensors\.modified \d+ there, 5 here"):
        quantize(source, out, OPTIONS)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["quantize", "append"])
def test_memory_that_runs_out_in_a_thread(source, expected, tmp_path, monkeypatch, where):
    def fails(*arguments, **keywords):
        raise MemoryError

    out = tmp_path / "out"
    holder = {"quantize": engine.CpuEngine, "append": shard.ShardWriter}[where]
    with monkeypatch.context() as patch:
        watch = after_a_shard(out, lambda: patch.setattr(holder, where, fails))
        with pytest.raises(OutOfMemoryError, match="ran out of memory; end other programs, or give a sm") as error:
            quantize(source, out, OPTIONS, watch=watch)
    goes_on(source, out, error, expected)


def test_memory_that_runs_out_is_one_line(source, tmp_path, monkeypatch):
    def fails(*arguments, **keywords):
        raise MemoryError

    monkeypatch.setattr(engine.CpuEngine, "quantize", fails)
    result = CliRunner().invoke(main, [str(source), "--format", "nf4", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: the machine ran out of memory; end other programs, or give a smaller --max-memory or fewer --workers\n"
    )
    assert not (tmp_path / "out").exists()


def no_sync(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def no_sync_at_all(descriptor):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


@pytest.mark.parametrize("fsync", [no_sync, no_sync_at_all])
def test_a_file_system_without_fsync(source, expected, tmp_path, monkeypatch, fsync):
    monkeypatch.setattr(os, "fsync", fsync)
    quantize(source, tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks(source, expected, tmp_path, monkeypatch, code):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("surogate_quantize.output_errors.fcntl.flock", flock)
    quantize(source, tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == expected


def test_a_file_system_that_fails_to_lock(source, tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("surogate_quantize.output_errors.fcntl.flock", flock)
    with pytest.raises(OutputNotWritableError, match="Input/output error"):
        quantize(source, tmp_path / "out", OPTIONS)


def test_a_system_that_writes_at_no_offset(source, expected, tmp_path, monkeypatch):
    """Windows."""
    monkeypatch.delattr(os, "pwrite")
    quantize(source, tmp_path / "out", OPTIONS, workers=4)
    assert contents(tmp_path / "out") == expected


def test_a_system_without_locks(source, expected, tmp_path, monkeypatch):
    """Windows."""
    monkeypatch.setattr("surogate_quantize.output_errors.fcntl", None)
    quantize(source, tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == expected


def test_a_system_without_anything_that_windows_has_not(source, tmp_path):
    script = Path(__file__).with_name("as_windows.py")
    ran = subprocess.run(
        [sys.executable, script, source, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    quantize(source, tmp_path / "here", make_options("nf4", {}))
    assert contents(tmp_path / "out") == contents(tmp_path / "here")


def test_a_clock_that_jumps(source, expected, tmp_path, monkeypatch):
    out, rng = tmp_path / "out", random.Random(8)
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, lambda: rng.randrange(2**31))
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, OPTIONS, watch=after_a_shard(out, interrupt))
    for path in (out / STAGING).rglob("*"):
        os.utime(path, (0, rng.randrange(2**31)))
    assert quantize(source, out, OPTIONS).reused_shards >= 1
    assert contents(out) == expected
