"""The checkpoint reader on checkpoints as they should be, and on random damage to them."""

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from surogate_formats.checkpoint import Checkpoint, parse_header, read_header
from surogate_formats.checkpoint.errors import (
    NoNumpyTypeError,
    SymlinkedDirectoryError,
    TruncatedFileError,
    UnreadableFileError,
)
from surogate_formats.checkpoint.tensor_info import TensorInfo
from surogate_formats.dtypes import BITS, NUMPY

INDEX = "model.safetensors.index.json"


def write(directory: Path, shards: dict[str, dict[str, np.ndarray]], config: bytes = b"{}") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_bytes(config)
    for name, tensors in shards.items():
        (directory / name).parent.mkdir(exist_ok=True)
        save_file(tensors, directory / name)
    return directory


def write_index(directory: Path, shards: dict[str, dict[str, np.ndarray]]) -> None:
    weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def test_header_fields_of_a_literal_file() -> None:
    text = b'{"__metadata__":{"k":"v"},"b":{"dtype":"I8","shape":[],"data_offsets":[4,5]},'
    text += b'"a":{"dtype":"F4","shape":[2,4],"data_offsets":[0,4]}}   '
    data = len(text).to_bytes(8, "little") + text + b"\1\2\3\4\5"
    header = parse_header(data, len(data), "f")
    start = 8 + len(text)
    assert header.tensors == {
        "a": TensorInfo("a", "F4", (2, 4), start, start + 4),
        "b": TensorInfo("b", "I8", (), start + 4, start + 5),
    }
    assert list(header.tensors) == ["a", "b"]
    assert header.metadata == {"k": "v"}
    assert header.header_size == start
    assert header.sha256 == hashlib.sha256(data[:start]).hexdigest()


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype(dtype: str, tmp_path: Path) -> None:
    body = bytes([0, 1] * 12)
    count = len(body) * 8 // BITS[dtype]
    text = json.dumps({"x": {"dtype": dtype, "shape": [count], "data_offsets": [0, len(body)]}}).encode()
    write(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    with Checkpoint.open(tmp_path) as checkpoint:
        if dtype in NUMPY:
            assert checkpoint.read("x").dtype == NUMPY[dtype]
            assert checkpoint.read("x").tobytes() == body
        else:
            with pytest.raises(NoNumpyTypeError, match=r"model\.safetensors: tensor 'x': F"):
                checkpoint.read("x")
        buffer = bytearray(len(body))
        assert checkpoint.read_into("x", memoryview(buffer)) == len(body)
        assert buffer == body


THREE = {
    "sub/model-3.safetensors": {"z": np.arange(3, dtype=np.int16)},
    "model-2.safetensors": {"b": np.arange(5, dtype=np.uint8), "a": np.arange(2, dtype=np.float64)},
    "model-1.safetensors": {"y": np.array(7, dtype=np.int32)},
}


def test_shards_of_an_index_in_order(tmp_path: Path) -> None:
    write(
        tmp_path,
        {**THREE, "adapter.safetensors": {"y": np.zeros(1)}, ".hidden.safetensors": {"y": np.ones(1)}},
    )
    write_index(tmp_path, THREE)
    with Checkpoint.open(tmp_path) as checkpoint:
        # safetensors puts wider dtypes first
        assert list(checkpoint.tensors) == ["y", "a", "b", "z"]
        assert [file.name for file in checkpoint.files] == sorted(THREE)
        assert checkpoint.unused == ("adapter.safetensors",)
        for file in checkpoint.files:
            path = tmp_path / file.name
            assert file.size == path.stat().st_size
            assert file.header_sha256 == read_header(path).sha256
        for shard, tensors in THREE.items():
            for name, array in tensors.items():
                assert checkpoint.tensors[name].file == shard
                np.testing.assert_array_equal(checkpoint.read(name), array)


@pytest.mark.parametrize(
    "shards",
    [
        {"model.safetensors": {"a": np.ones(1)}, "z.safetensors": {"a": np.zeros(1)}},
        {"anything.safetensors": {"a": np.ones(1)}},
        {"x.safetensors": {"a": np.ones(1)}, "y.safetensors": {"b": np.ones(1)}},
        {
            "m-00001-of-00002.safetensors": {"a": np.ones(1)},
            "m-00002-of-00002.safetensors": {"b": np.ones(1)},
        },
    ],
    ids=["model.safetensors first", "a single file", "several disjoint files", "a numbered set"],
)
def test_shards_without_an_index(shards: dict[str, dict[str, np.ndarray]], tmp_path: Path) -> None:
    write(tmp_path, shards)
    with Checkpoint.open(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("a"), np.ones(1))
        assert {file.name for file in checkpoint.files} | set(checkpoint.unused) == shards.keys()


def test_index_may_name_a_single_model_safetensors(tmp_path: Path) -> None:
    shards = {"model.safetensors": {"a": np.ones(1)}}
    write(tmp_path, shards)
    write_index(tmp_path, shards)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


def test_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    """Every file is a link into `blobs`, and the directory is named through a link as well."""
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "main"
    write(blobs, THREE)
    write_index(blobs, THREE)
    (snapshot / "sub").mkdir(parents=True)
    for name in ("config.json", INDEX, *THREE):
        (blobs / name).rename(blobs / name.replace("/", "-"))
        up = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{up}blobs/{name.replace('/', '-')}")
    (tmp_path / "link").symlink_to(snapshot)
    with Checkpoint.open(tmp_path / "link") as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("z"), np.arange(3))


def test_directory_swapped_for_a_link_is_refused_even_inside_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, {"real/m.safetensors": {"a": np.ones(1)}})
    write_index(tmp_path, {"linked/m.safetensors": {"a": np.ones(1)}})
    (tmp_path / "linked").symlink_to("real")
    with pytest.raises(SymlinkedDirectoryError):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "found_by_path",
    [test_snapshot_of_the_hub_cache, test_directory_swapped_for_a_link_is_refused_even_inside_the_checkpoint],
)
def test_where_directories_cannot_be_opened(
    found_by_path: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows."""
    monkeypatch.delattr(os, "O_DIRECTORY")
    found_by_path(tmp_path)


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(0, 130), st.integers(1, 9))
def test_read_into_any_range_despite_short_reads(offset: int, room: int, most: int) -> None:
    preadv = os.preadv

    def short(descriptor: int, buffers: list[memoryview], position: int) -> int:
        return preadv(descriptor, [buffers[0][:most]], position)

    data = np.arange(100, dtype=np.uint8)
    buffer = np.full(room, 255, np.uint8)
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        write(Path(directory), {"model.safetensors": {"a": np.zeros(3), "x": data.reshape(25, 4)}})
        patch.setattr(os, "preadv", short)
        with Checkpoint.open(directory) as checkpoint:
            count = checkpoint.read_into("x", buffer.data, offset)
    assert count == min(room, 100 - offset)
    np.testing.assert_array_equal(buffer[:count], data[offset : offset + count])
    assert (buffer[count:] == 255).all()


def test_read_into_a_typed_buffer(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": {"x": np.arange(6, dtype=np.int32)}})
    target = np.zeros((2, 3), np.int32)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read_into("x", target.data) == 24
    np.testing.assert_array_equal(target.ravel(), np.arange(6))


@pytest.mark.parametrize("offset", [-1, 9])
def test_offset_outside_the_tensor(offset: int, tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": {"x": np.zeros(1)}})
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(ValueError, match="outside tensor 'x' of 8 bytes"),
    ):
        checkpoint.read_into("x", memoryview(bytearray(1)), offset)


def test_shard_that_shrinks(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": {"x": np.zeros(1000)}})
    path = tmp_path / "model.safetensors"
    with Checkpoint.open(tmp_path) as checkpoint:
        size = path.stat().st_size
        os.truncate(path, size - 1)
        buffer = memoryview(bytearray(8000))
        assert checkpoint.read_into("x", buffer[:7999]) == 7999
        with pytest.raises(TruncatedFileError, match=f"promises {size} bytes, file has {size - 1}; download"):
            checkpoint.read_into("x", buffer)


def test_data_shorter_than_its_header() -> None:
    data = save({"x": np.zeros(1)})
    with pytest.raises(TruncatedFileError, match="f: truncated"):
        parse_header(data[:20], len(data), "f")


def test_header_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="nothing: cannot be read: No such file"):
        read_header(tmp_path / "nothing")


@pytest.mark.parametrize("call", ["preadv", "scandir"])
def test_disk_that_fails(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write(tmp_path, {"model.safetensors": {"x": np.zeros(1)}})
    with monkeypatch.context() as patch, pytest.raises(UnreadableFileError, match="Input/output error"):
        patch.setattr(os, call, fail)
        Checkpoint.open(tmp_path)


def test_threads_read_at_once(tmp_path: Path) -> None:
    tensors = {str(number): np.full(4099, number, np.uint16) for number in range(40)}
    write(tmp_path, {"model.safetensors": tensors})
    with Checkpoint.open(tmp_path) as checkpoint, ThreadPoolExecutor(8) as pool:
        for name, array in zip(tensors, pool.map(checkpoint.read, tensors), strict=True):
            np.testing.assert_array_equal(array, tensors[name])


@pytest.mark.parametrize("missing", [("preadv",), ("preadv", "pread")], ids=["macOS 10", "Windows"])
def test_threads_read_at_once_without_a_read_at_an_offset(
    missing: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in missing:
        monkeypatch.delattr(os, call)
    test_threads_read_at_once(tmp_path)


@pytest.mark.parametrize("missing", ["preadv", "pread"])
def test_a_shard_that_shrinks_is_told_there_too(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in {"preadv", missing}:
        monkeypatch.delattr(os, call)
    test_shard_that_shrinks(tmp_path)


def test_source_is_neither_changed_nor_mapped_nor_reopened(tmp_path: Path) -> None:
    path = write(tmp_path, {"model.safetensors": {"x": np.ones(3)}}) / "model.safetensors"
    before = path.stat()
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.read("x")
        after = path.stat()
        maps = Path("/proc/self/maps")
        assert not maps.exists() or str(path) not in maps.read_text()
        path.unlink()
        np.testing.assert_array_equal(checkpoint.read("x"), np.ones(3))
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)


def test_closed_checkpoint_reads_no_other_file(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": {"x": np.ones(3)}})
    with Checkpoint.open(tmp_path) as checkpoint:
        pass
    with (tmp_path / "config.json").open("rb"), pytest.raises(ValueError, match="closed"):
        checkpoint.read("x")


def test_config_as_it_stands(tmp_path: Path) -> None:
    text = b'{ "time_step_limit": [0.0, Infinity], "name": "\xc3\xa4", "a": 1, "a": 2 }\n'
    write(tmp_path, {"model.safetensors": {"x": np.ones(3)}}, text)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config_bytes == text
        assert checkpoint.config == {"time_step_limit": [0.0, math.inf], "name": "ä", "a": 2}
