"""Hostile safetensors files as literal bytes: what each is, its bytes, the error it earns."""

from surogate_formats.checkpoint import errors


def file(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def entry(dtype: bytes = b'"U8"', shape: bytes = b"[1]", offsets: bytes = b"[0,1]", name: bytes = b'"a"') -> bytes:
    return b'{%b:{"dtype":%b,"shape":%b,"data_offsets":%b}}' % (name, dtype, shape, offsets)


GOOD = file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\x07")
A_0_2 = b'"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
OTHER = b'"b":{"dtype":"U8","shape":[2],"data_offsets":[%b]}'

HEADER_ATTACKS: dict[str, tuple[bytes, type[errors.CheckpointError]]] = {
    # The prefix
    "no byte at all": (b"", errors.TruncatedFileError),
    "7 bytes": (b"\x02\0\0\0\0\0\0", errors.TruncatedFileError),
    "header past the end": (b"\x03\0\0\0\0\0\0\0{}", errors.TruncatedFileError),
    "header of 40 MB and a byte": (b"\x01\x5a\x62\x02\0\0\0\0{}", errors.HeaderTooLargeError),
    "header of 2^64 - 1 bytes": (b"\xff\xff\xff\xff\xff\xff\xff\xff{}", errors.HeaderTooLargeError),
    "a zip file, so a pickle": (b"PK\x03\x04\0\0\x08\x08\0\0", errors.HeaderTooLargeError),
    "a web page": (b"<!DOCTYPE html><html>404</html>", errors.HeaderTooLargeError),
    "git-lfs stub": (b"version x/spec/v1\noid sha256:00\nsize 9\n", errors.GitLfsPointerError),
    # The JSON
    "empty header": (b"\0\0\0\0\0\0\0\0", errors.HeaderPaddingError),
    "space before {": (file(b" {}"), errors.HeaderPaddingError),
    "byte order mark": (file(b"\xef\xbb\xbf{}"), errors.HeaderPaddingError),
    "a list": (file(b"[{}]"), errors.HeaderPaddingError),
    "newline after }": (file(b"{}\n"), errors.HeaderPaddingError),
    "null bytes after }": (file(b"{}\0\0"), errors.HeaderPaddingError),
    "bad UTF-8": (file(b'{"\xff":{}}'), errors.JsonEncodingError),
    "overlong UTF-8": (file(b'{"\xc0\xae":{}}'), errors.JsonEncodingError),
    "UTF-16": (file("{}".encode("utf-16-le").rstrip(b"\0") + b" }"), errors.JsonSyntaxError),
    "not JSON": (file(b"{a:1}"), errors.JsonSyntaxError),
    "two objects": (file(b"{}{}"), errors.HeaderPaddingError),
    "raw newline in a name": (file(entry(name=b'"a\n"'), b"\x07"), errors.JsonSyntaxError),
    "100 000 nested lists": (
        file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        errors.JsonNestingError,
    ),
    "65 nested lists": (file(b'{"a":' + b"[" * 65 + b"]" * 65 + b"}"), errors.JsonNestingError),
    "NaN": (file(entry(shape=b"[NaN]"), b"\x07"), errors.JsonNumberError),
    "-Infinity": (file(entry(offsets=b"[-Infinity,1]"), b"\x07"), errors.JsonNumberError),
    "a million digits": (file(entry(offsets=b"[0,1%b]" % (b"0" * 10**6)), b"\x07"), errors.JsonNumberError),
    "tensor twice": (file(entry()[:-1] + b"," + entry()[1:], b"\x07"), errors.DuplicateKeyError),
    "tensor twice, once escaped": (
        file(entry()[:-1] + b"," + entry(name=rb'"\u0061"')[1:], b"\x07"),
        errors.DuplicateKeyError,
    ),
    "shape twice": (
        file(b'{"a":{"dtype":"U8","shape":[9],"shape":[1],"data_offsets":[0,1]}}', b"\x07"),
        errors.DuplicateKeyError,
    ),
    "metadata twice": (file(b'{"__metadata__":{},"__metadata__":{}}'), errors.DuplicateKeyError),
    "metadata key twice": (file(b'{"__metadata__":{"k":"1","k":"2"}}'), errors.DuplicateKeyError),
    # The metadata
    "metadata of a list": (file(b'{"__metadata__":[]}'), errors.MetadataError),
    "metadata null": (file(b'{"__metadata__":null}'), errors.MetadataError),
    "metadata of numbers": (file(b'{"__metadata__":{"k":1}}'), errors.MetadataError),
    "metadata half a surrogate": (file(rb'{"__metadata__":{"k":"\ud800"}}'), errors.MetadataError),
    # Names
    "name empty": (file(entry(name=b'""'), b"\x07"), errors.TensorNameError),
    "name ..": (file(entry(name=b'".."'), b"\x07"), errors.TensorNameError),
    "name ../../x": (file(entry(name=b'"../../x"'), b"\x07"), errors.TensorNameError),
    "name /x": (file(entry(name=b'"/x"'), b"\x07"), errors.TensorNameError),
    "name x/y": (file(entry(name=b'"x/y"'), b"\x07"), errors.TensorNameError),
    "name ..\\x": (file(entry(name=rb'"..\\x"'), b"\x07"), errors.TensorNameError),
    "name C:x": (file(entry(name=b'"C:x"'), b"\x07"), errors.TensorNameError),
    "name with a null": (file(entry(name=rb'"a\u0000"'), b"\x07"), errors.TensorNameError),
    "name with a newline": (file(entry(name=rb'"a\nb"'), b"\x07"), errors.TensorNameError),
    "name with a terminal escape": (file(entry(name=rb'"\u001b[2J"'), b"\x07"), errors.TensorNameError),
    "name written right to left": (file(entry(name=rb'"a\u202eb"'), b"\x07"), errors.TensorNameError),
    "name half a surrogate": (file(entry(name=rb'"\ud800"'), b"\x07"), errors.TensorNameError),
    "name of 1025 bytes": (file(entry(name=b'"%b"' % (b"a" * 1025)), b"\x07"), errors.TensorNameError),
    "name of 513 two-byte letters": (
        file(entry(name=b'"%b"' % ("ä".encode() * 513)), b"\x07"),
        errors.TensorNameError,
    ),
    # Entries
    "entry a number": (file(b'{"a":1}'), errors.TensorEntryError),
    "entry without shape": (
        file(b'{"a":{"dtype":"U8","data_offsets":[0,1]}}', b"\x07"),
        errors.TensorEntryError,
    ),
    "entry with a fourth key": (
        file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":0}}', b"\x07"),
        errors.TensorEntryError,
    ),
    "dtype unknown": (file(entry(dtype=b'"U7"'), b"\x07"), errors.UnknownDtypeError),
    "dtype in lower case": (file(entry(dtype=b'"u8"'), b"\x07"), errors.UnknownDtypeError),
    "dtype a list": (file(entry(dtype=b"[]"), b"\x07"), errors.UnknownDtypeError),
    "shape a number": (file(entry(shape=b"1"), b"\x07"), errors.ShapeError),
    "shape negative": (file(entry(shape=b"[-1,-1]"), b"\x07"), errors.ShapeError),
    "shape of true": (file(entry(shape=b"[true]"), b"\x07"), errors.ShapeError),
    "shape of 1.0": (file(entry(shape=b"[1.0]"), b"\x07"), errors.ShapeError),
    "shape of 65 dimensions": (file(entry(shape=b"[1%b]" % (b",1" * 64)), b"\x07"), errors.ShapeError),
    "shape product 2^64 + 1 wraps to 1": (
        file(entry(shape=b"[274177,67280421310721]"), b"\x07"),
        errors.ShapeError,
    ),
    "shape product 2^64 hidden by 0": (
        file(entry(shape=b"[0,4294967296,4294967296]", offsets=b"[0,0]")),
        errors.ShapeError,
    ),
    "shape of 2^60 doubles": (file(entry(b'"F64"', b"[1152921504606846976]"), b"\x07"), errors.ShapeError),
    "one F4 element": (file(entry(dtype=b'"F4"'), b"\x07"), errors.PartialByteError),
    "three F6 elements": (file(entry(b'"F6_E2M3"', b"[3]", b"[0,2]"), b"\x07\x07"), errors.PartialByteError),
    # Offsets
    "offsets negative": (file(entry(offsets=b"[-1,0]"), b"\x07"), errors.OffsetsError),
    "offsets of -0": (file(entry(offsets=b"[-0,1]"), b"\x07"), errors.OffsetsError),
    "offsets reversed": (file(entry(offsets=b"[1,0]"), b"\x07"), errors.OffsetsError),
    "offsets of booleans": (file(entry(offsets=b"[false,true]"), b"\x07"), errors.OffsetsError),
    "offsets of floats": (file(entry(offsets=b"[0.0,1.0]"), b"\x07"), errors.OffsetsError),
    "offsets of strings": (file(entry(offsets=b'["0","1"]'), b"\x07"), errors.OffsetsError),
    "offsets null": (file(entry(offsets=b"null"), b"\x07"), errors.OffsetsError),
    "one offset": (file(entry(offsets=b"[1]"), b"\x07"), errors.OffsetsError),
    "three offsets": (file(entry(offsets=b"[0,1,1]"), b"\x07"), errors.OffsetsError),
    "offsets of 2^63": (
        file(entry(offsets=b"[9223372036854775808,9223372036854775809]"), b"\x07"),
        errors.OffsetsError,
    ),
    "bytes fewer than the shape's": (file(entry(shape=b"[2]"), b"\x07"), errors.SizeMismatchError),
    "bytes more than the shape's": (file(entry(offsets=b"[0,2]"), b"\x07\x07"), errors.SizeMismatchError),
    "bytes for no element": (file(entry(shape=b"[0]"), b"\x07"), errors.SizeMismatchError),
    # The file's layout
    "tensor past the end": (file(entry(shape=b"[2]", offsets=b"[0,2]"), b"\x07"), errors.TruncatedFileError),
    "tensor of 2^62 bytes": (
        file(entry(shape=b"[4611686018427387904]", offsets=b"[0,4611686018427387904]"), b"\x07"),
        errors.TruncatedFileError,
    ),
    "tensors overlap": (file(b"{%b,%b}" % (A_0_2, OTHER % b"1,3"), b"\x07" * 3), errors.OverlapError),
    "tensors share one range": (file(b"{%b,%b}" % (A_0_2, OTHER % b"0,2"), b"\x07" * 2), errors.OverlapError),
    "empty tensor inside another": (
        file(b'{%b,"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}' % A_0_2, b"\x07" * 2),
        errors.OverlapError,
    ),
    "hole between tensors": (file(b"{%b,%b}" % (A_0_2, OTHER % b"3,5"), b"\x07" * 5), errors.HoleError),
    "hole before the first": (file(entry(offsets=b"[1,2]"), b"\x07" * 2), errors.HoleError),
    "a program after the last": (GOOD + b"#!/bin/sh", errors.TrailingBytesError),
    "bytes and no tensor": (file(b"{}", b"\x07"), errors.TrailingBytesError),
}
