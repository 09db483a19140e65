"""JSON from strangers: bounded, unambiguous, and every failure a `CheckpointError` that names the file."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn

from surogate_formats.checkpoint.errors import (
    DuplicateKeyError,
    JsonEncodingError,
    JsonNestingError,
    JsonNumberError,
    JsonSyntaxError,
    JsonTooLargeError,
    NotAnObjectError,
    quoted,
)

MAX_TEXT = 16 * 2**20
"""Characters of a text that is parsed whole: a config that names 200 000 modules, indented, has 14 million."""

MAX_VALUES = 1_000_000
"""Lists, objects and members of lists and objects of such a text; each takes tens of bytes of memory."""

# A text with any letter beyond ASCII may take four bytes a character.
_WIDEST = 4
# 2^64 has 20 digits. Python converts a long literal in quadratic time, before 3.10.7 without any limit.
_MOST_DIGITS = 40
# A header is 3 levels deep, a real config fewer than 10; printing or writing the value recurses once a level.
_MOST_LEVELS = 64


def parse_object(data: bytes, where: str, *, strict: bool = True) -> dict[str, Any]:
    """Parse a JSON object of any content, whole; `json_reader` is for those that may be larger.

    Args:
        data: The JSON text in UTF-8.
        where: What the error messages name: the file.
        strict: Refuse duplicate keys and NaN or Infinity. Only `config.json` is read without: real ones hold
            `Infinity` (Mamba's `time_step_limit`), and transformers accepts both.

    Raises:
        JsonTooLargeError: It would take more memory than any real one.
        JsonEncodingError: The text is not UTF-8.
        JsonSyntaxError: It is not JSON.
        JsonNestingError: It is nested more than 64 levels deep.
        JsonNumberError: It holds an integer of more than 40 digits or, if strict, no finite number.
        DuplicateKeyError: If strict, an object names a key twice.
        NotAnObjectError: It is not an object.
    """
    if len(data) > (MAX_TEXT if data.isascii() else MAX_TEXT // _WIDEST):
        raise JsonTooLargeError(f"{where}: {len(data)} bytes of JSON, more than any real one has; download it again")
    if len(data) > MAX_VALUES and len(data) - len(data.translate(None, b"[{,")) > MAX_VALUES:
        raise JsonTooLargeError(f"{where}: holds more than {MAX_VALUES} values; download it again")
    try:
        value = make_decoder(where, strict=strict).decode(decoded(data, where))
    except json.JSONDecodeError as error:
        raise syntax_error(where, error.msg, error.pos) from None
    except RecursionError:
        raise JsonNestingError(f"{where}: JSON nested too deep; download it again") from None
    check_depth(value, where)
    if not isinstance(value, dict):
        raise not_an_object(where, value)
    return value


def make_decoder(where: str, *, strict: bool = True) -> json.JSONDecoder:
    """A decoder that refuses what `parse_object` refuses, but for what is too large or too deep."""

    def constant(literal: str) -> NoReturn:
        raise JsonNumberError(f"{where}: holds {literal}, which is not JSON; download it again")

    def integer(literal: str) -> int | float:
        if strict and literal == "-0":
            return -0.0  # not a size, as in safetensors' own parser
        if len(literal) > _MOST_DIGITS:
            raise JsonNumberError(f"{where}: holds an integer of {len(literal)} digits; download it again")
        return int(literal)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise duplicate_key(where, twice)
        return result

    def finite(literal: str) -> float:
        value = float(literal)
        if math.isinf(value):
            raise JsonNumberError(f"{where}: holds {quoted(literal)}, which is no finite number; download it again")
        return value

    hooks: dict[str, Any] = {"parse_constant": constant, "parse_float": finite, "object_pairs_hook": unique}
    return json.JSONDecoder(parse_int=integer, **(hooks if strict else {}))


def decoded(data: bytes, where: str) -> str:
    """The text of bytes in UTF-8; `JsonEncodingError` if they are something else."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise encoding_error(where, error.start) from None


def check_depth(value: object, where: str) -> None:
    """Raises `JsonNestingError` if a parsed value is nested more than 64 levels deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_LEVELS):
        if not level:
            return
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    if level:
        raise JsonNestingError(f"{where}: JSON nested too deep; download it again")


def encoding_error(where: str, position: int) -> JsonEncodingError:
    """The error for a text with a byte that is no UTF-8."""
    return JsonEncodingError(f"{where}: not UTF-8 at byte {position}; download it again")


def syntax_error(where: str, problem: str, position: int) -> JsonSyntaxError:
    """The error for a text that is not JSON from some character on."""
    return JsonSyntaxError(f"{where}: not JSON: {problem} at character {position}; download it again")


def duplicate_key(where: str, key: str) -> DuplicateKeyError:
    """The error for an object that names a key twice."""
    return DuplicateKeyError(f"{where}: names the key {quoted(key)} twice; download it again")


def not_an_object(where: str, value: object) -> NotAnObjectError:
    """The error for a text that holds some other value."""
    return NotAnObjectError(f"{where}: holds a JSON {type(value).__name__}, not an object; download it again")
