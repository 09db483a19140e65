"""The output directory: what is refused, untouched."""

import errno
from pathlib import Path

import pytest

from surogate_quantize.output import check_output
from surogate_quantize.output_errors import (
    OutputExistsError,
    OutputInSourceError,
    OutputNotWritableError,
)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "models" / "source").mkdir(parents=True)
    return tmp_path / "models" / "source"


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


def test_a_file_or_a_dangling_link_is_refused(source):
    (source.parent / "file").write_text("mine")
    (source.parent / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(OutputExistsError, match="is not a directory"):
            check_output(source.parent / name, source, overwrite=True)


def test_a_directory_that_may_not_be_looked_into(source, monkeypatch):
    def refuses(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuses)
    with pytest.raises(OutputNotWritableError, match=r"^`out` .*: Permission denied; choose another"):
        check_output(source.parent / "out", source, overwrite=False)
