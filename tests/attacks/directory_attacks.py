"""Hostile or broken checkpoint directories: what each is, how it is made, the error and the file it names."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from attacks.header_attacks import GOOD, entry, file

from surogate_formats.checkpoint import errors
from surogate_formats.checkpoint.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SHARD_A, SHARD_B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
GOOD_B = file(entry(name=b'"b"'), b"\x08")

TRAVERSALS = (
    "../../../secret.safetensors",
    "sub/../../../secret.safetensors",
    "..\\..\\secret.safetensors",
    "sub\\..\\..\\secret.safetensors",
    "/secret.safetensors",
    "C:\\secret.safetensors",
    "C:/secret.safetensors",
    "D:sub\\secret.safetensors",
    "\\\\host\\share\\secret.safetensors",
    "\\secret.safetensors",
    "sub/C:\\secret.safetensors",
    "sub/\\\\host\\share\\secret.safetensors",
    "sub/\\secret.safetensors",
)
"""The ways out of a directory that huggingface_hub guards against, for a shard's name."""

ODD_NAMES = (
    "",
    ".",
    "./model.safetensors",
    "sub//model.safetensors",
    "model.safetensors/",
    "model.safetensors\0",
    "model\n.safetensors",
    "model.safetensors:stream.safetensors",
    "\x1b[2J.safetensors",
    "\ud800.safetensors",
    "a" * 1025 + ".safetensors",
)
"""Shard names that mean two things, or none, on some system."""


class DirectoryAttack(NamedTuple):
    make: Callable[[Path], object]
    error: type[CheckpointError]
    names: str


def write(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def weights(files: dict[str, bytes]) -> Callable[[Path], None]:
    return lambda directory: write(directory, {"config.json": b"{}", **files})


def index(weight_map: object) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def indexed(weight_map: object, files: dict[str, bytes] | None = None) -> Callable[[Path], None]:
    shards = {SHARD_A: GOOD, SHARD_B: GOOD_B} if files is None else files
    return weights({INDEX: index(weight_map), **shards})


def config(content: bytes) -> Callable[[Path], None]:
    return lambda directory: write(directory, {"config.json": content, "model.safetensors": GOOD})


def sparse(name: str, size: int) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        write(directory, {"config.json": b"{}", "model.safetensors": GOOD})
        with (directory / name).open("ab") as stream:
            stream.truncate(size)

    return make


def linked_directory(directory: Path) -> None:
    write(directory.parent, {"elsewhere/model.safetensors": GOOD})
    indexed({"a": "sub/model.safetensors"}, {})(directory)
    (directory / "sub").symlink_to("../elsewhere")


def linked(name: str, target: str, files: dict[str, bytes]) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        weights(files)(directory)
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)

    return make


def pipe(name: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        write(directory, {"config.json": b"{}", "model.safetensors": GOOD})
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return make


BOTH = {"a": SHARD_A, "b": SHARD_B}

DIRECTORY_ATTACKS: dict[str, DirectoryAttack] = {
    "no such directory": DirectoryAttack(lambda path: path.rmdir(), errors.CheckpointNotFoundError, "model"),
    "directory below a file": DirectoryAttack(
        lambda path: (path.rmdir(), path.parent.rmdir(), path.parent.write_bytes(b"")),
        errors.CheckpointNotFoundError,
        "model",
    ),
    "a file for a directory": DirectoryAttack(
        lambda path: (path.rmdir(), path.write_bytes(GOOD)), errors.CheckpointIsAFileError, "model"
    ),
    "empty directory": DirectoryAttack(lambda path: None, errors.EmptyCheckpointError, "model"),
    "only pickles": DirectoryAttack(
        weights({"pytorch_model.bin": b"cos\nsystem\n."}), errors.PickledWeightsError, "pytorch_model.bin"
    ),
    "no weights": DirectoryAttack(weights({"model.gguf": b"GGUF"}), errors.NoWeightsError, "model"),
    "no config": DirectoryAttack(
        lambda path: write(path, {"model.safetensors": GOOD}), errors.MissingConfigError, "config.json"
    ),
    "index beside a model.safetensors that it does not name": DirectoryAttack(
        indexed(BOTH, {SHARD_A: GOOD, SHARD_B: GOOD_B, "model.safetensors": GOOD}),
        errors.AmbiguousCheckpointError,
        "model.safetensors",
    ),
    # Files that are none
    "weights a pipe": DirectoryAttack(pipe("model.safetensors"), errors.NotARegularFileError, "model.safetensors"),
    "config a pipe": DirectoryAttack(pipe("config.json"), errors.NotARegularFileError, "config.json"),
    "index a pipe": DirectoryAttack(pipe(INDEX), errors.NotARegularFileError, INDEX),
    "weights a device": DirectoryAttack(
        linked("model.safetensors", "/dev/zero", {}), errors.NotARegularFileError, "model.safetensors"
    ),
    "weights a directory": DirectoryAttack(
        weights({"model.safetensors/x": b""}), errors.NotARegularFileError, "model.safetensors"
    ),
    "config a link to itself": DirectoryAttack(
        linked("config.json", "config.json", {"model.safetensors": GOOD}),
        errors.UnreadableFileError,
        "config.json",
    ),
    "index a link to nothing": DirectoryAttack(
        linked(INDEX, "nothing", {"model.safetensors": GOOD}), errors.UnreadableFileError, INDEX
    ),
    "weights a link to nothing": DirectoryAttack(
        linked("model.safetensors", "../../blobs/nothing", {}), errors.MissingShardError, "model.safetensors"
    ),
    # The config
    "config of 1 GB": DirectoryAttack(sparse("config.json", 2**30), errors.JsonTooLargeError, "config.json"),
    "config empty": DirectoryAttack(config(b""), errors.JsonSyntaxError, "config.json"),
    "config a list": DirectoryAttack(config(b"[]"), errors.NotAnObjectError, "config.json"),
    "config bad UTF-8": DirectoryAttack(config(b'{"\xff":1}'), errors.JsonEncodingError, "config.json"),
    "config of 100 000 nested objects": DirectoryAttack(
        config(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), errors.JsonNestingError, "config.json"
    ),
    "config a million digits": DirectoryAttack(
        config(b'{"a":1%b}' % (b"0" * 10**6)), errors.JsonNumberError, "config.json"
    ),
    # The index
    "index of 1 GB": DirectoryAttack(sparse(INDEX, 2**30), errors.JsonTooLargeError, INDEX),
    "index not JSON": DirectoryAttack(weights({INDEX: b"{"}), errors.JsonSyntaxError, INDEX),
    "index a list": DirectoryAttack(weights({INDEX: b"[]"}), errors.NotAnObjectError, INDEX),
    "index NaN": DirectoryAttack(weights({INDEX: b'{"weight_map":NaN}'}), errors.JsonNumberError, INDEX),
    "tensor indexed twice": DirectoryAttack(
        weights({INDEX: b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'}),
        errors.DuplicateKeyError,
        INDEX,
    ),
    "weight_map missing": DirectoryAttack(weights({INDEX: b"{}"}), errors.IndexStructureError, INDEX),
    "weight_map a list": DirectoryAttack(indexed([SHARD_A]), errors.IndexStructureError, INDEX),
    "weight_map empty": DirectoryAttack(indexed({}), errors.IndexStructureError, INDEX),
    "weight_map of numbers": DirectoryAttack(indexed({"a": 1}), errors.IndexStructureError, INDEX),
    "shard a pickle": DirectoryAttack(indexed({"a": "model.bin"}), errors.ShardSuffixError, INDEX),
    "shard in a linked directory": DirectoryAttack(
        linked_directory, errors.SymlinkedDirectoryError, "sub/model.safetensors"
    ),
    "shard below a file": DirectoryAttack(
        indexed({"a": f"{SHARD_A}/model.safetensors"}), errors.UnreadableFileError, SHARD_A
    ),
    "shard missing": DirectoryAttack(indexed(BOTH, {SHARD_A: GOOD}), errors.MissingShardError, SHARD_B),
    "shard in a missing directory": DirectoryAttack(
        indexed({"a": "sub/model.safetensors"}), errors.MissingShardError, "sub/model.safetensors"
    ),
    "shard missing, no index": DirectoryAttack(weights({SHARD_A: GOOD}), errors.MissingShardError, "1 of 2"),
    "file name that clears the terminal": DirectoryAttack(
        weights({"\x1b[2J.safetensors": GOOD}), errors.UnsafeShardNameError, r"\x1b[2J.safetensors"
    ),
    # Index against shards
    "tensor in the other shard": DirectoryAttack(
        indexed({"a": SHARD_B, "b": SHARD_A}), errors.MisplacedTensorError, SHARD_B
    ),
    "tensor in no shard": DirectoryAttack(indexed({**BOTH, "c": SHARD_A}), errors.MisplacedTensorError, SHARD_A),
    "tensor not in the index": DirectoryAttack(
        indexed(
            {"a": SHARD_A},
            {SHARD_A: file(b"{%b,%b}" % (entry()[1:-1], entry(name=b'"b"', offsets=b"[1,2]")[1:-1]), b"\x07\x08")},
        ),
        errors.UnlistedTensorError,
        SHARD_A,
    ),
    "tensor in two shards": DirectoryAttack(
        indexed(
            BOTH,
            {
                SHARD_A: GOOD,
                SHARD_B: file(b"{%b,%b}" % (entry()[1:-1], entry(name=b'"b"', offsets=b"[1,2]")[1:-1]), b"\x07\x08"),
            },
        ),
        errors.DuplicateTensorError,
        SHARD_B,
    ),
    "tensor in two files, no index": DirectoryAttack(
        weights({"x.safetensors": GOOD, "y.safetensors": GOOD}), errors.DuplicateTensorError, "y.safetensors"
    ),
    **{
        f"shard {name[:40]!r}": DirectoryAttack(indexed({"a": name}), errors.UnsafeShardNameError, INDEX)
        for name in (*TRAVERSALS, *ODD_NAMES)
    },
}
