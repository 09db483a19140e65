"""Output shards: every reader's view of them, alignment, and bytes that don't depend on the order of writing."""

import hashlib
import os

import numpy as np
import pytest
from safetensors import safe_open

from surogate_formats.checkpoint import parse_header
from surogate_formats.dtypes import NUMPY
from surogate_formats.format import TensorSpec
from surogate_formats.layouts import StoredTensor
from surogate_quantize.shard import ALIGNMENT, ShardWriter

TENSORS = {
    "a.weight": ("U8", (3, 5)),
    "a.weight_scale": ("F8_E4M3", (7,)),
    "b.norm": ("BF16", (9,)),
    "b.offset": ("F32", (1,)),
    "c.scalar": ("F32", ()),
    "c.empty": ("F16", (0, 4)),
    "näme": ("I64", (2,)),
}
STORED = [StoredTensor(name, TensorSpec(*spec)) for name, spec in TENSORS.items()]


def array_of(name):
    dtype, shape = TENSORS[name]
    count = int(np.prod(shape)) * NUMPY[dtype].itemsize
    seed = int.from_bytes(name.encode(), "little") % 2**32
    return np.random.default_rng(seed).integers(0, 120, count, dtype=np.uint8).view(NUMPY[dtype]).reshape(shape)


def write(path, order):
    digests = {}
    with ShardWriter(path, STORED) as shard:
        for name in order:
            data = array_of(name).reshape(-1).view(np.uint8).data
            digests[name] = shard.write(name, [data[:3], data[3:]])
        shard.sync()
    return digests


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "model.safetensors"
    digests = write(path, TENSORS)
    return path, digests


def test_safetensors_own_reader_sees_every_tensor(shard):
    path, _ = shard
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == TENSORS.keys()
        assert opened.metadata() == {"format": "pt"}
        for name, (_, shape) in TENSORS.items():
            tensor = opened.get_tensor(name)
            assert tuple(tensor.shape) == shape
            import torch

            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array_of(name).tobytes()


def test_our_strict_header_check_takes_it_and_every_tensor_is_aligned_to_its_dtype(shard):
    path, _ = shard
    data = path.read_bytes()
    header = parse_header(data, len(data), path)
    assert header.header_size % ALIGNMENT == 0
    for name, info in header.tensors.items():
        assert info.start % NUMPY[info.dtype].itemsize == 0
        assert data[info.start : info.end] == array_of(name).tobytes()


def test_neighbours_stay_neighbours_within_an_element_size(shard):
    path, _ = shard
    data = path.read_bytes()
    order = list(parse_header(data, len(data), path).tensors)
    assert order[0] == "näme"
    assert order.index("b.offset") < order.index("c.scalar") < order.index("b.norm") < order.index("a.weight")
    assert order[-2:] == ["a.weight", "a.weight_scale"]


def test_digests_are_of_the_payload(shard):
    _, digests = shard
    assert digests == {name: hashlib.sha256(array_of(name).tobytes()).hexdigest() for name in TENSORS}


def test_the_order_of_writing_changes_no_byte(shard, tmp_path):
    path, _ = shard
    write(tmp_path / "other.safetensors", reversed(TENSORS))
    assert (tmp_path / "other.safetensors").read_bytes() == path.read_bytes()


def test_short_writes_are_continued(shard, tmp_path, monkeypatch):
    path, _ = shard
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, position: whole(file, data[:2], position))
    write(tmp_path / "other.safetensors", TENSORS)
    assert (tmp_path / "other.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("count", [14, 16])
def test_a_payload_of_another_size_is_our_own_mistake(tmp_path, count):
    with ShardWriter(tmp_path / "x.safetensors", STORED) as shard, pytest.raises(AssertionError, match=r"a\.weight"):
        shard.write("a.weight", [memoryview(bytes(count))])


def test_a_file_that_is_there_is_not_overwritten(shard):
    path, _ = shard
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        ShardWriter(path, STORED)
    assert path.read_bytes() == before
