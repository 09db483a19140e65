"""Each attack earns exactly its error: one line that names the file, nothing written or left open, 100 MB at most."""

import inspect
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
from attacks.all_attacks import ATTACKS, FAMILIES, WHILE_READ, table
from attacks.attack import COMMANDS
from attacks.directory_attacks import TRAVERSALS, write
from attacks.header_attacks import GOOD, HEADER_ATTACKS
from attacks.models import MADE, ours
from hypothesis import given, settings
from hypothesis import strategies as st

from surogate_formats.artifact import Artifact, NoRecordedHashesError
from surogate_formats.checkpoint import Checkpoint, errors, parse_header, read_header
from surogate_formats.checkpoint.errors import CheckpointError
from surogate_formats.checkpoint.index import check_shard_name
from surogate_formats.errors import SurogateError

README = Path(__file__).with_name("README.md")
PEAK = 100_000_000


def descriptors() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "parent" / "model"
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(tmp_path)  # pytest would keep a gigabyte of them


@contextmanager
def nothing_lost() -> Iterator[None]:
    before = descriptors()
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert descriptors() == before
    assert peak < PEAK


def assert_message(error: SurogateError, kind: type[SurogateError], *names: str) -> None:
    message = str(error)
    assert type(error) is kind, message
    assert message.isprintable(), repr(message)
    assert all(name in message for name in names), message
    assert len(message) < 500


def contents(directory: Path) -> dict[str, tuple[int, int, int]]:
    """What stands below a directory, links not followed."""
    states = {str(path): path.lstat() for path in directory.rglob("*")}
    return {path: (state.st_ino, state.st_size, state.st_mtime_ns) for path, state in states.items()}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str, model: Path) -> None:
    attack = ATTACKS[name]
    attack.make(model)
    before, root = contents(model.parent.parent), model.parent.parent
    with nothing_lost(), pytest.raises(SurogateError) as caught:
        COMMANDS[attack.command](model)
    assert_message(caught.value, attack.error, str(model), attack.names)
    assert contents(root) == before


@pytest.mark.parametrize(("data", "kind"), HEADER_ATTACKS.values(), ids=HEADER_ATTACKS.keys())
def test_header_alone(data: bytes, kind: type[CheckpointError], model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(data)
    for attempt in (lambda: read_header(path), lambda: parse_header(data, len(data), path)):
        with nothing_lost(), pytest.raises(CheckpointError) as caught:
            attempt()
        assert_message(caught.value, kind, str(path))


@pytest.mark.parametrize("kind", MADE)
def test_what_is_attacked_is_right_before(kind: str, model: Path) -> None:
    ours(kind).write(model)
    with Artifact.open(model) as artifact:
        assert artifact.verify() == len(artifact.checkpoint.tensors)
    if MADE[kind][1] != "surogate":
        (model / "surogate.json").unlink()
        with Artifact.open(model) as artifact, pytest.raises(NoRecordedHashesError, match="no scale or code is out"):
            artifact.verify()


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("factor", [0, 1e-45, 1e-30, 3.4e38])
def test_values_at_the_ends_of_float32_are_in_range(kind: str, factor: float, model: Path) -> None:
    ours(kind, np.float32(factor)).write(model)
    with Artifact.open(model) as artifact:
        artifact.verify()


def test_names_are_unique() -> None:
    assert len(ATTACKS) == sum(map(len, FAMILIES)) > 200


def test_shard_shrinks_while_it_is_read(model: Path) -> None:
    write(model, {"config.json": b"{}", "model.safetensors": GOOD})
    with Checkpoint.open(model) as checkpoint:
        (model / "model.safetensors").write_bytes(GOOD[:-1])
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read("a")
    assert_message(caught.value, errors.TruncatedFileError, "model.safetensors", "download it again")


def test_shard_is_written_to_while_it_is_read(model: Path) -> None:
    write(model, {"config.json": b"{}", "model.safetensors": GOOD})
    path = model / "model.safetensors"
    with Checkpoint.open(model) as checkpoint:
        checkpoint.read("a")
        checkpoint.check_unchanged()
        os.utime(path, ns=(0, 0))
        with pytest.raises(CheckpointError) as caught:
            checkpoint.check_unchanged()
    assert_message(caught.value, errors.ChangedFileError, "model.safetensors", "run it again")


def test_shard_that_is_replaced_while_it_is_read_does_no_harm(model: Path) -> None:
    write(model, {"config.json": b"{}", "model.safetensors": GOOD, "other": GOOD[:-1] + b"\x09"})
    with Checkpoint.open(model) as checkpoint:
        (model / "other").replace(model / "model.safetensors")
        assert checkpoint.read("a") == 7
        checkpoint.check_unchanged()


def test_truncated_message_counts_the_bytes(model: Path) -> None:
    with pytest.raises(errors.TruncatedFileError, match="truncated: header promises 62 bytes, file has 61; down"):
        parse_header(GOOD[:-1], len(GOOD) - 1, "model.safetensors")


@pytest.mark.parametrize("path", ["a\nb", "\x1b[2J", "a\0b", "a" * 5000])
def test_odd_path_from_the_command_line(path: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert str(caught.value).isprintable()


@settings(deadline=None)
@given(st.text(st.sampled_from("ab./\\: C"), max_size=12).map(lambda name: name + ".safetensors"))
def test_accepted_shard_name_stays_inside_on_every_system(name: str) -> None:
    try:
        check_shard_name(name, "index")
    except errors.UnsafeShardNameError:
        return
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        assert not path.anchor
        assert ".." not in path.parts
    assert PureWindowsPath(name).as_posix() == str(PurePosixPath(name)) == name


def test_every_escape_that_the_hub_rejects_is_covered() -> None:
    assert len(set(TRAVERSALS)) == 13


def test_readme_holds_the_table() -> None:
    assert f"\n{table()}\n" in README.read_text()
    classes = {name for name, _ in inspect.getmembers(errors, inspect.isclass)} - {"CheckpointError"}
    assert classes <= {attack.error.__name__ for attack in ATTACKS.values()} | set(WHILE_READ.values())
