"""From a checkpoint's directory to its shards, and the index held against what they hold."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surogate_formats.checkpoint.errors import (
    AmbiguousCheckpointError,
    DuplicateTensorError,
    EmptyCheckpointError,
    IndexStructureError,
    JsonTooLargeError,
    MisplacedTensorError,
    MissingShardError,
    NoWeightsError,
    PickledWeightsError,
    ShardSuffixError,
    UnlistedTensorError,
    UnsafeShardNameError,
    quoted,
)
from surogate_formats.checkpoint.json_reader import JsonReader, reader_of

SUFFIX = ".safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_SIZE = 40_000_000
"""Largest index accepted, in bytes. One of 92 000 tensors, a large mixture of experts, takes 9 MB."""

MAX_NAME_SIZE = 1024
"""Longest shard name accepted, in bytes of UTF-8."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")


@dataclass(frozen=True)
class Shards:
    """Which files of a directory are the checkpoint.

    Attributes:
        names: Paths of the shards relative to the directory, sorted.
        weight_map: The index: shard name by tensor name; None where there is no index.
        unused: Names of the directory's other safetensors files, sorted.
    """

    names: tuple[str, ...]
    weight_map: dict[str, str] | None
    unused: tuple[str, ...]


def find_shards(files: Sequence[str], index: bytes | None, directory: str) -> Shards:
    """Choose the shards: those of the index, else `model.safetensors`, else every safetensors file.

    Args:
        files: Names of the directory's entries.
        index: Content of `model.safetensors.index.json`, None where there is none.
        directory: What the error messages name.

    Raises:
        EmptyCheckpointError: The directory holds nothing.
        PickledWeightsError: Its only weights are pickles.
        NoWeightsError: It holds no weights.
        AmbiguousCheckpointError: `model.safetensors` stands beside an index that does not name it.
        MissingShardError: Without an index, the numbering `-i-of-n` has gaps.
        CheckpointError: The index is malformed; see `parse_index`.
    """
    # A leading dot marks what is not a model's: AppleDouble files, downloads under way.
    present = sorted(name for name in files if name.endswith(SUFFIX) and not name.startswith("."))
    weight_map = None
    if index is not None:
        weight_map = parse_index(index, f"{directory}/{INDEX}")
        chosen = sorted(set(weight_map.values()))
        if SINGLE in present and SINGLE not in chosen:
            message = f"{directory}: {INDEX} does not name {SINGLE} beside it; remove the one that is stale"
            raise AmbiguousCheckpointError(message)
    elif SINGLE in present:
        chosen = [SINGLE]
    else:
        chosen = present
        if not chosen:
            raise _no_weights(files, directory)
        for name in chosen:
            check_shard_name(name, directory)
        _check_numbering(chosen, directory)
    return Shards(tuple(chosen), weight_map, tuple(name for name in present if name not in chosen))


def parse_index(data: bytes, file: str) -> dict[str, str]:
    """Parse an index: shard name by tensor name.

    Raises:
        IndexStructureError: `weight_map` is missing, empty, or does not map to strings.
        UnsafeShardNameError: A shard's name is not a plain relative path.
        ShardSuffixError: A shard's name does not end in `.safetensors`.
        CheckpointError: It is not a JSON object; see `JsonReader`.
    """
    if len(data) > MAX_INDEX_SIZE:
        raise JsonTooLargeError(f"{file}: {len(data)} bytes, more than the {MAX_INDEX_SIZE} allowed; download it again")
    reader = JsonReader(reader_of(data), file)
    weight_map: dict[str, str] = {}
    for key in reader.members():
        if key == "weight_map" and reader.next() == "{":
            weight_map = _weight_map(reader, file)
        else:
            reader.value()
    reader.end()
    if not weight_map:
        message = f"{file}: has no weight_map from tensor names to file names; download it again"
        raise IndexStructureError(message)
    return weight_map


def _weight_map(reader: JsonReader, file: str) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    known: dict[str, str] = {}
    for tensor in reader.members():
        shard = reader.value()
        if not isinstance(shard, str):
            message = f"{file}: the weight_map gives tensor {quoted(tensor)} no file name; download it again"
            raise IndexStructureError(message)
        if shard not in known:
            check_shard_name(shard, file)
        weight_map[tensor] = known.setdefault(shard, shard)
    return weight_map


def check_shard_name(name: str, where: str) -> None:
    """Refuse a shard's name that is not a plain relative path on every system, whichever one this is.

    On Windows a backslash separates and a colon ends a drive or starts a stream: neither may stand in a name.

    Raises:
        UnsafeShardNameError: It is absolute, too long, or holds `..`, a backslash, a colon or a control code.
        ShardSuffixError: It does not end in `.safetensors`, so it may be a pickle.
    """
    if not is_plain_path(name):
        message = f"{where}: shard name {quoted(name)} is not a plain relative path; do not use this checkpoint"
        raise UnsafeShardNameError(message)
    if not name.endswith(SUFFIX):
        message = f"{where}: shard name {quoted(name)} does not end in {SUFFIX}; do not use this checkpoint"
        raise ShardSuffixError(message)


def is_plain_path(name: str) -> bool:
    """Whether a name is a plain relative path on every system."""
    if not name.isprintable() or "\\" in name or ":" in name or len(name.encode()) > MAX_NAME_SIZE:
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))


def check_agreement(holders: Mapping[str, Sequence[str]], weight_map: Mapping[str, str] | None, where: str) -> None:
    """Hold an index against the shards.

    Args:
        holders: For each tensor the names of the shards that hold it.
        weight_map: The index, if there is one.
        where: What the error messages name: the directory.

    Raises:
        DuplicateTensorError: Two shards hold one tensor.
        MisplacedTensorError: The index places a tensor in a shard that does not hold it.
        UnlistedTensorError: A shard holds a tensor that the index does not list.
    """
    for tensor, shards in holders.items():
        if len(shards) > 1:
            message = f"{where}: tensor {quoted(tensor)} is in both {quoted(shards[0])} and {quoted(shards[1])}"
            raise DuplicateTensorError(f"{message}; remove the file that is stale")
    if weight_map is None:
        return
    for tensor, shard in weight_map.items():
        if holders.get(tensor, ()) != (shard,):
            message = f"{where}: {INDEX} places tensor {quoted(tensor)} in {quoted(shard)}, which lacks it"
            raise MisplacedTensorError(f"{message}; download both again")
    for tensor, shards in holders.items():
        if tensor not in weight_map:
            message = f"{where}: tensor {quoted(tensor)} of {quoted(shards[0])} is not in {INDEX}"
            raise UnlistedTensorError(f"{message}; download both again")


def _check_numbering(names: Sequence[str], directory: str) -> None:
    numbers: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            numbers[match["stem"], int(match["total"])].add(int(match["number"]))
    for (stem, total), found in numbers.items():
        if len(found) != total:
            message = f"{directory}: {len(found)} of {total} shards of {quoted(stem)}; download the others"
            raise MissingShardError(message)


def _no_weights(files: Sequence[str], directory: str) -> EmptyCheckpointError | PickledWeightsError | NoWeightsError:
    if not files:
        return EmptyCheckpointError(f"{directory}: empty; download the model into it")
    if pickle := next((name for name in sorted(files) if name.endswith(_PICKLES)), None):
        advice = "convert it with transformers' save_pretrained or download a safetensors revision"
        return PickledWeightsError(f"{directory}: only {quoted(pickle)}: a pickle runs code when loaded; {advice}")
    return NoWeightsError(f"{directory}: no {SUFFIX} file; give the directory of a model's weights")
