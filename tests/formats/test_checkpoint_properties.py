"""Random checkpoints, whole, damaged and forged: accepted and consistent, or a CheckpointError."""

import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from surogate_formats.checkpoint import Checkpoint, Header, parse_header
from surogate_formats.dtypes import BITS, NUMPY
from surogate_formats.errors import CheckpointError

# numpy's writer in safetensors knows these; the rest are written by hand below.
WRITABLE = [name for name in NUMPY if "FNUZ" not in name and name != "C64"]
LETTERS = st.characters(codec="utf-8", categories=["L", "N"], include_characters="._-")
NAMES = st.text(LETTERS, min_size=1, max_size=20)
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def arrays() -> st.SearchStrategy[np.ndarray]:
    def build(dtype: str, shape: list[int], seed: int) -> np.ndarray:
        size = math.prod(shape) * NUMPY[dtype].itemsize
        raw = np.random.default_rng(seed).integers(0, 2 if dtype == "BOOL" else 256, size, np.uint8)
        return raw.view(NUMPY[dtype]).reshape(shape)

    shapes = st.lists(st.integers(0, 5), max_size=4)
    return st.builds(build, st.sampled_from(WRITABLE), shapes, st.integers(0, 2**32 - 1))


def assert_consistent(header: Header, data: bytes) -> None:
    """The header describes the file's every byte exactly once, and the safetensors library reads the same."""
    assert hashlib.sha256(data[: header.header_size]).hexdigest() == header.sha256
    position = header.header_size
    for name, info in header.tensors.items():
        assert name == info.name
        assert info.start == position
        assert info.nbytes * 8 == math.prod(info.shape) * BITS[info.dtype]
        position = info.end
    assert position == len(data) == header.file_size
    theirs = {name: tensor["data"] for name, tensor in safetensors.deserialize(data)}
    assert theirs == {name: data[info.start : info.end] for name, info in header.tensors.items()}


# At least one tensor: with none and metadata, safetensors 0.8.0 writes a header that isn't JSON.
@settings(deadline=None)
@given(st.dictionaries(NAMES, arrays(), min_size=1, max_size=6), st.dictionaries(NAMES, TEXT))
def test_round_trip_of_what_safetensors_writes(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "model.safetensors")
        save_file(tensors, file, metadata=metadata)
        Path(directory, "config.json").write_text("{}")
        with Checkpoint.open(directory) as checkpoint:
            assert checkpoint.tensors.keys() == tensors.keys()
            assert checkpoint.headers[file.name].metadata == metadata
            assert_consistent(checkpoint.headers[file.name], file.read_bytes())
            for name, expected in tensors.items():
                array = checkpoint.read(name)
                assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
                assert array.flags.c_contiguous
                assert array.flags.writeable
                assert array.tobytes() == expected.tobytes()


VALID = [
    save({"a": np.zeros((2, 3), np.float32), "b.weight": np.ones(4, ml_dtypes.bfloat16)}, {"format": "pt"}),
    save({"a": np.zeros((), np.int64), "empty": np.zeros((0, 3), np.uint8), "c": np.zeros(5, np.uint8)}),
    save({}),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 3)))
        alphabet = st.sampled_from(list(b'0123456789{}[]":,. -eaFU\\\0\xff')) | st.integers(0, 255)
        data[start:stop] = draw(st.lists(alphabet, max_size=3))
    if draw(st.booleans()) and len(data) >= 8:  # repair the length, to come past it
        end = data.rfind(b"}") + 1
        data[:8] = max(end - 8, 0).to_bytes(8, "little")
    return bytes(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SIZES = st.integers(-1, 4) | st.sampled_from([2**31, 2**32, 2**61, 2**63 - 1, 2**63, 2**64])


@st.composite
def forged(draw: st.DrawFn) -> bytes:
    """A file whose header has the right form and, mostly, wrong values."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(NAMES, max_size=3, unique=True)):
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(SIZES if draw(st.booleans()) else st.integers(0, 4), max_size=3))
        size = max(0, math.prod(shape) * BITS[dtype] // 8)
        start = max(0, position + draw(st.sampled_from([0, 0, 0, 0, 1, -1])))
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        position += size
        if draw(st.integers(0, 4)) == 0:
            entry[draw(st.sampled_from([*entry, "extra"]))] = draw(JSON)
        header[name] = entry
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(TEXT, TEXT, max_size=2) | JSON)
    text = json.dumps(header).encode()
    body = bytes(min(max(position + draw(st.sampled_from([0, 0, 0, -1, 1])), 0), 4096))
    return len(text).to_bytes(8, "little") + text + body


@settings(deadline=None)
@given(damaged() | forged())
def test_hostile_file_is_consistent_or_a_checkpoint_error(data: bytes) -> None:
    try:
        header = parse_header(data, len(data), "model.safetensors")
    except CheckpointError as error:
        assert str(error).isprintable()
        assert str(error).startswith("model.safetensors: ")
    else:
        assert_consistent(header, data)
