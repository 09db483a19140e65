"""Files whose cost is the attack: headers, indexes and metadata of the largest size, and files beside the weights."""

import gzip
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from attacks.attack import Attack
from attacks.directory_attacks import INDEX
from attacks.header_attacks import GOOD, file

from surogate_formats.checkpoint import errors
from surogate_formats.checkpoint.errors import CheckpointError
from surogate_formats.checkpoint.header import MAX_HEADER_SIZE
from surogate_formats.checkpoint.index import MAX_INDEX_SIZE
from surogate_quantize.sidecars import OutsideLinkError

EMOJI = "😀".encode()
ENTRY = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def zipped(compress: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compress) as archive:
        archive.writestr("data.pkl", bytes(2**22))
    return stream.getvalue()


def header(make: Callable[[], bytes], error: type[CheckpointError]) -> Attack:
    """A header, followed by no tensor."""

    def write(directory: Path) -> None:
        (directory / "config.json").write_bytes(b"{}")
        (directory / "model.safetensors").write_bytes(file(make()))

    return Attack(write, "quantize", error, "model.safetensors")


def filled(start: bytes, piece: bytes, end: bytes = b"}") -> Callable[[], bytes]:
    """As many pieces as the largest header holds."""
    return lambda: start + piece * ((MAX_HEADER_SIZE - len(start) - len(end)) // len(piece)) + end


def index(make: Callable[[], bytes], error: type[CheckpointError]) -> Attack:
    def write(directory: Path) -> None:
        (directory / "config.json").write_bytes(b"{}")
        (directory / "model.safetensors").write_bytes(GOOD)
        (directory / INDEX).write_bytes(make())

    return Attack(write, "quantize", error, INDEX)


def sparse_header(directory: Path) -> None:
    (directory / "config.json").write_bytes(b"{}")
    path = directory / "model.safetensors"
    path.write_bytes(MAX_HEADER_SIZE.to_bytes(8, "little") + b"{")
    os.truncate(path, 2**40)


def beside(name: str, make: Callable[[Path], object], error: type[CheckpointError]) -> Attack:
    def write(directory: Path) -> None:
        make(directory / name)

    return Attack(write, "carry over", error, name)


def secret(path: Path) -> None:
    (path.parent.parent / "secret").write_text("secret")
    path.symlink_to("../secret")


def linked_templates(path: Path) -> None:
    (path.parent.parent / "elsewhere").mkdir()
    (path.parent.parent / "elsewhere" / "x.jinja").touch()
    path.symlink_to("../elsewhere")


def loop(path: Path) -> None:
    path.mkdir()
    (path / "loop.jinja").symlink_to("loop.jinja")


def stolen_template(path: Path) -> None:
    path.mkdir()
    (path / "x.jinja").symlink_to("/etc/hostname")


BOMB_ATTACKS: dict[str, Attack] = {
    # Headers
    "header a zip": header(zipped, errors.HeaderPaddingError),
    "header a stored zip": header(lambda: zipped(zipfile.ZIP_STORED), errors.HeaderPaddingError),
    "header a gzip": header(lambda: gzip.compress(bytes(2**22)), errors.HeaderPaddingError),
    "header of 40 MB of zeros in 1 TB": Attack(sparse_header, "quantize", errors.JsonSyntaxError, "model.safetensors"),
    "header of 40 MB of lists": header(filled(b'{"a":[', b"[],", b"1]}"), errors.JsonTooLargeError),
    "header of 40 MB of numbers": header(filled(b'{"a":[', b"1,", b"1]}"), errors.JsonTooLargeError),
    "header of 40 MB of objects": header(filled(b"{", b'"a":{},'), errors.HeaderTooLargeError),
    "header of 700 000 tensors": header(
        lambda: b"{" + b",".join(ENTRY % i for i in range(700_000)) + b"}", errors.HeaderTooLargeError
    ),
    "header of 40 MB of opening brackets": header(filled(b'{"a":', b"["), errors.JsonNestingError),
    "header of 40 MB of one name": header(filled(b'{"', b"a", b'":1}'), errors.JsonTooLargeError),
    "header of 40 MB of one escaped name": header(filled(b'{"', rb"\u0041", b'":1}'), errors.JsonTooLargeError),
    "header of 40 MB of one number": header(
        filled(b'{"a":{"dtype":"U8","shape":[', b"1", b"]}}"), errors.JsonNumberError
    ),
    "header of a tensor of 10 million sides": header(
        filled(b'{"a":{"dtype":"U8","shape":[1', b",1", b'],"data_offsets":[0,1]}}'), errors.JsonTooLargeError
    ),
    "header of a tensor of 10 million offsets": header(
        filled(b'{"a":{"dtype":"U8","data_offsets":[0', b",0", b'],"shape":[0]}}'), errors.JsonTooLargeError
    ),
    "header of 40 MB of bad UTF-8": header(filled(b'{"', b"\xff"), errors.JsonEncodingError),
    "header of 40 MB of spaces, then a comma": header(filled(b"{", b" ", b",}"), errors.JsonSyntaxError),
    "header of 40 MB after its end": header(filled(b"{}", b" x"), errors.HeaderPaddingError),
    # Metadata
    "metadata of 100 000 keys": header(
        lambda: b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(100_000)) + b"}}", errors.MetadataError
    ),
    "metadata of 40 MB in one text": header(filled(b'{"__metadata__":{"a":"', b"a", b'"}}'), errors.JsonTooLargeError),
    "metadata of 40 MB of emojis": header(filled(b'{"__metadata__":{"a":"', EMOJI, b'"}}'), errors.JsonTooLargeError),
    "metadata of 40 MB in 48 texts of emojis": header(
        lambda: b'{"__metadata__":{' + b",".join(b'"%d":"%b"' % (i, EMOJI * 200_000) for i in range(48)) + b"}}",
        errors.MetadataError,
    ),
    "metadata of 40 MB of braces": header(filled(b'{"__metadata__":{"a":"', b"{", b'"}}'), errors.HeaderTooLargeError),
    "metadata of 40 MB of lists": header(filled(b'{"__metadata__":{"a":[', b"[],", b"1]}}"), errors.JsonTooLargeError),
    "metadata of 40 MB of escapes": header(filled(b'{"__metadata__":{"a":"', rb"\n", b'"}}'), errors.JsonTooLargeError),
    # Indexes
    "index of 40 MB of lists": index(
        lambda: b'{"metadata":[' + b"[]," * (MAX_INDEX_SIZE // 3 - 20) + b"1]}", errors.JsonTooLargeError
    ),
    "index of 40 MB of one name": index(
        lambda: b'{"weight_map":{"' + b"a" * (MAX_INDEX_SIZE - 50) + b'":"x.safetensors"}}', errors.JsonTooLargeError
    ),
    "index of 40 MB of emojis": index(
        lambda: b'{"a":"' + EMOJI * (MAX_INDEX_SIZE // 4 - 20) + b'"}', errors.JsonTooLargeError
    ),
    "index of 40 MB of opening brackets": index(lambda: b'{"a":' + b"[" * 39_000_000, errors.JsonNestingError),
    "index of a million objects": index(
        lambda: b'{"weight_map":{' + b",".join(b'"%d":{}' % i for i in range(10**6)) + b"}}",
        errors.IndexStructureError,
    ),
    # Files that would go along
    "tokenizer a link out": beside("tokenizer.json", secret, OutsideLinkError),
    "tokenizer a link to /etc": beside(
        "tokenizer.model", lambda path: path.symlink_to("/etc/hostname"), OutsideLinkError
    ),
    "tokenizer a pipe": beside("tokenizer.json", os.mkfifo, errors.NotARegularFileError),
    "tokenizer a device": beside("vocab.json", lambda path: path.symlink_to("/dev/zero"), OutsideLinkError),
    "tokenizer a link to itself": beside(
        "tokenizer.json", lambda path: path.symlink_to("tokenizer.json"), errors.UnreadableFileError
    ),
    "templates a link out": beside("additional_chat_templates", linked_templates, OutsideLinkError),
    "template a link to itself": beside("additional_chat_templates", loop, errors.UnreadableFileError),
    "template a link out": beside("additional_chat_templates", stolen_template, OutsideLinkError),
}
