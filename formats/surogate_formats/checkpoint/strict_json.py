"""JSON from strangers: bounded, unambiguous, and every failure a `CheckpointError` that names the file."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

from surogate_formats.checkpoint.errors import (
    DuplicateKeyError,
    JsonEncodingError,
    JsonNestingError,
    JsonNumberError,
    JsonSyntaxError,
    NotAnObjectError,
    quoted,
)

# 2^64 has 20 digits. Python converts a long literal in quadratic time, before 3.10.7 without any limit.
_MOST_DIGITS = 40
# A header is 3 levels deep, a real config fewer than 10; printing or writing the value recurses once a level.
_MOST_LEVELS = 64


def parse_object(data: bytes, where: str, *, strict: bool = True) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: The JSON text in UTF-8.
        where: What the error messages name: the file.
        strict: Refuse duplicate keys and NaN or Infinity. Only `config.json` is read without: real ones hold
            `Infinity` (Mamba's `time_step_limit`), and transformers accepts both.

    Raises:
        JsonEncodingError: The text is not UTF-8.
        JsonSyntaxError: It is not JSON.
        JsonNestingError: It is nested more than 64 levels deep.
        JsonNumberError: It holds an integer of more than 40 digits or, if strict, NaN or Infinity.
        DuplicateKeyError: If strict, an object names a key twice.
        NotAnObjectError: It is not an object.
    """

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
            raise DuplicateKeyError(f"{where}: names the key {quoted(twice)} twice; download it again")
        return result

    hooks: dict[str, Any] = {"parse_constant": constant, "object_pairs_hook": unique} if strict else {}
    try:
        value = json.loads(data.decode("utf-8"), parse_int=integer, **hooks)
    except UnicodeDecodeError as error:
        raise JsonEncodingError(f"{where}: not UTF-8 at byte {error.start}; download it again") from None
    except json.JSONDecodeError as error:
        message = f"{where}: not JSON: {error.msg} at character {error.pos}; download it again"
        raise JsonSyntaxError(message) from None
    except RecursionError:
        raise JsonNestingError(f"{where}: JSON nested too deep; download it again") from None
    if _is_deep(value):
        raise JsonNestingError(f"{where}: JSON nested too deep; download it again")
    if not isinstance(value, dict):
        raise NotAnObjectError(f"{where}: holds a JSON {type(value).__name__}, not an object; download it again")
    return value


def _is_deep(value: object) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_LEVELS):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    return bool(level)
