"""Each attack earns exactly its error: one line that names the file, at no cost in descriptors or memory."""

import inspect
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from attacks.directory_attacks import DIRECTORY_ATTACKS, ODD_NAMES, TRAVERSALS, DirectoryAttack, write
from attacks.header_attacks import GOOD, HEADER_ATTACKS
from hypothesis import given, settings
from hypothesis import strategies as st

from surogate_formats.checkpoint import Checkpoint, errors, parse_header, read_header
from surogate_formats.checkpoint.errors import CheckpointError
from surogate_formats.checkpoint.index import check_shard_name

README = Path(__file__).with_name("README.md")
PEAK = 16 * 2**20


def descriptors() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "parent" / "model"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def nothing_lost() -> Iterator[None]:
    before = descriptors()
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert descriptors() == before
    assert peak < PEAK


def assert_message(error: CheckpointError, kind: type[CheckpointError], *names: str) -> None:
    message = str(error)
    assert type(error) is kind, message
    assert message.isprintable(), repr(message)
    assert all(name in message for name in names), message
    assert len(message) < 500


@pytest.mark.usefixtures("nothing_lost")
@pytest.mark.parametrize(("data", "kind"), HEADER_ATTACKS.values(), ids=HEADER_ATTACKS.keys())
def test_header(data: bytes, kind: type[CheckpointError], model: Path) -> None:
    write(model, {"config.json": b"{}", "model.safetensors": data})
    path = model / "model.safetensors"
    for attempt in (
        lambda: Checkpoint.open(model),
        lambda: read_header(path),
        lambda: parse_header(data, len(data), path),
    ):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert_message(caught.value, kind, str(path))


@pytest.mark.usefixtures("nothing_lost")
@pytest.mark.parametrize("attack", DIRECTORY_ATTACKS.values(), ids=DIRECTORY_ATTACKS.keys())
def test_directory(attack: DirectoryAttack, model: Path) -> None:
    attack.make(model)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(model)
    assert_message(caught.value, attack.error, str(model), attack.names)


def test_shard_shrinks_while_it_is_read(model: Path) -> None:
    write(model, {"config.json": b"{}", "model.safetensors": GOOD})
    with Checkpoint.open(model) as checkpoint:
        (model / "model.safetensors").write_bytes(GOOD[:-1])
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read("a")
    assert_message(caught.value, errors.TruncatedFileError, "model.safetensors", "download it again")


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


def test_readme_is_the_table_of_attacks() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", README.read_text(), re.MULTILINE)
    listed = {(error, attack) for error, attacks in rows for attack in attacks.split("; ")}
    earned = {(kind.__name__, name) for name, (_, kind) in HEADER_ATTACKS.items()}
    earned |= {
        (attack.error.__name__, name) for name, attack in DIRECTORY_ATTACKS.items() if not name.startswith("shard '")
    }
    spellings = len(TRAVERSALS + ODD_NAMES)
    earned.add(("UnsafeShardNameError", f"{spellings} spellings of a shard outside, or of none"))
    earned.add(("TruncatedFileError", "shard shrinks while it is read"))
    earned.add(("NoNumpyTypeError", "F4 tensor read as an array"))
    assert listed == earned
    classes = {name for name, _ in inspect.getmembers(errors, inspect.isclass)} - {"CheckpointError"}
    assert classes == {error for error, _ in rows}
