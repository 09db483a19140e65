"""The reader of large JSON objects reads what `json` reads, wherever its windows end."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surogate_formats.checkpoint import json_reader, parse_header
from surogate_formats.checkpoint.errors import JsonSyntaxError, JsonTooLargeError
from surogate_formats.checkpoint.json_reader import JsonReader, reader_of
from surogate_formats.errors import CheckpointError

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def in_pieces(data: bytes, size: int) -> Callable[[int], bytes]:
    read = reader_of(data)
    return lambda count: read(min(count, size))


def members(data: bytes, size: int) -> dict[str, Any]:
    reader = JsonReader(in_pieces(data, size), "f")
    found = {key: reader.value() for key in reader.members()}
    reader.end()
    return found


@settings(deadline=None)
@given(
    st.dictionaries(TEXT, VALUES, max_size=6),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 9),
)
def test_the_same_as_json(value: dict[str, Any], indent: int | None, escape: bool, window: int, size: int) -> None:
    data = json.dumps(value, indent=indent, ensure_ascii=escape).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "_WINDOW", window)
        assert members(data, size) == value


@settings(deadline=None)
@given(st.dictionaries(TEXT, VALUES, max_size=3), st.integers(0, 60), st.binary(max_size=2), st.integers(1, 40))
def test_damaged_text_is_read_as_json_reads_it_or_refused(
    value: dict[str, Any], place: int, piece: bytes, window: int
) -> None:
    data = json.dumps(value).encode()
    data = data[:place] + piece + data[place + 1 :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "_WINDOW", window)
        try:
            found = members(data, 7)
        except CheckpointError as error:
            assert str(error).isprintable()
            return
    assert found == json.loads(data)


def test_nested_objects_are_read_by_their_members() -> None:
    reader = JsonReader(reader_of(b'{"a": {"b": 1, "c": {}}, "d": 2} '), "f")
    found = [
        (key, [(inner, reader.value()) for inner in reader.members()] if key == "a" else reader.value())
        for key in reader.members()
    ]
    reader.end()
    assert found == [("a", [("b", 1), ("c", {})]), ("d", 2)]


def test_place_of_an_error_counts_from_the_start() -> None:
    data = b'{"a":"' + b"x" * 300_000 + b'","b" 1}'
    with pytest.raises(JsonSyntaxError, match="at character 300012"):
        members(data, 1000)


def test_a_text_may_be_longer_than_a_list() -> None:
    text, numbers = b'{"a":"' + b"x" * 500_000 + b'"}', b'{"a":[' + b"1," * 250_000 + b"1]}"
    for data, fine in ((text, True), (numbers, False)):
        reader = JsonReader(reader_of(data), "f", longest=1000)
        assert next(reader.members()) == "a"
        if fine:
            assert len(reader.value()) == 500_000
        else:
            with pytest.raises(JsonTooLargeError, match="more than 1000 characters"):
                reader.value()


def test_a_file_of_100_000_tensors_is_honest() -> None:
    names = (f"model.layers.{i // 2000}.mlp.experts.{i % 2000}.down_proj.weight_scale_inv" for i in range(100_000))
    entries = {
        name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [24 * i, 24 * i + 24]} for i, name in enumerate(names)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    data = len(text).to_bytes(8, "little") + text
    assert len(parse_header(data, len(data) + 24 * 100_000, "f").tensors) == 100_000
