"""What this process may not read or write: one line, and nothing of anybody's is harmed."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from quantizer.checkpoints import contents, write_checkpoint
from quantizer.test_faults import OPTIONS, after_a_shard, interrupt

from surogate_formats.artifact import STAGING
from surogate_formats.checkpoint.errors import UnreadableFileError
from surogate_quantize import quantize
from surogate_quantize.output_errors import OutputNotWritableError

NOBODY = 65534


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source", shards=3)


@pytest.fixture
def strangers_folder(source):
    """A folder in which this process is nobody; kernels are loaded by then, and need no cache."""
    quantize(source, source.parent / "warm", OPTIONS)
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(source, folder / "source")
    user = os.geteuid()
    if user == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    yield folder
    os.seteuid(user)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_source_that_may_not_be_read(strangers_folder):
    (strangers_folder / "source" / "model-00002-of-00003.safetensors").chmod(0)
    with pytest.raises(UnreadableFileError, match=r"00002-of-00003\.safetensors: cannot be read: Permission denied"):
        quantize(strangers_folder / "source", strangers_folder / "out", OPTIONS)
    assert not (strangers_folder / "out").exists()


@pytest.mark.parametrize("made", [False, True])
def test_an_output_that_may_not_be_written_to(strangers_folder, made):
    above = strangers_folder / "above"
    (above / "out" if made else above).mkdir(parents=True)
    (above / "out" if made else above).chmod(0o555)
    with pytest.raises(OutputNotWritableError, match=r"^`out` .*/above/out: Permission denied; choose another dir"):
        quantize(strangers_folder / "source", above / "out", OPTIONS)
    assert list(above.iterdir()) == ([above / "out"] if made else [])


def test_an_unfinished_run_that_may_not_be_read(strangers_folder):
    """Of another user, say: it is left as it is."""
    source, out = strangers_folder / "source", strangers_folder / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, OPTIONS, watch=after_a_shard(out, interrupt))
    before = contents(out)
    for mode in (0, 0o555):
        (out / STAGING).chmod(mode)
        (out / STAGING / "files").chmod(mode) if mode else None
        with pytest.raises(OutputNotWritableError, match="Permission denied"):
            quantize(source, out, OPTIONS)
    for folder in (out / STAGING, out / STAGING / "files"):
        folder.chmod(0o755)
    assert contents(out) == before
    assert quantize(source, out, OPTIONS).reused_shards >= 1


def test_a_directory_that_may_be_written_to_and_not_read(strangers_folder):
    (strangers_folder / "above").mkdir()
    (strangers_folder / "above").chmod(0o333)
    quantize(strangers_folder / "source", strangers_folder / "above" / "out", OPTIONS)
    assert (strangers_folder / "above" / "out" / "surogate.json").exists()
