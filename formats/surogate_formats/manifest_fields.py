"""What each field of a manifest may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from surogate_formats.checkpoint.index import is_plain_path
from surogate_formats.checkpoint.tensor_info import MAX_DIMENSIONS
from surogate_formats.dtypes import BITS

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LIMIT = 2**63  # as in a safetensors header


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LIMIT


def _is_number(value: Any) -> bool:
    # An integer here has 40 digits at most; a float is finite.
    return type(value) in (int, float) and bool(value >= 0)


def _is_shape(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS or not all(map(_is_size, value)):
        return False
    return bool(math.prod(max(size, 1) for size in value) < _LIMIT)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _are_digests(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_digest, value.values()))


def _are_files(value: Any) -> bool:
    kinds = {"name": _is_text, "size": _is_size, "header_sha256": _is_digest, "sha256": _is_digest}
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and entry.keys() | {"sha256"} == kinds.keys()
        and all(kinds[key](item) for key, item in entry.items())
        for entry in value
    )


def _are_sidecars(value: Any) -> bool:
    return _are_digests(value) and all(map(is_plain_path, value))


def _are_options(value: Any) -> bool:
    return isinstance(value, dict) and all(_OPTIONS.get(key, _is_plain)(option) for key, option in value.items())


def _is_adapter(value: Any) -> bool:
    return isinstance(value, dict) and all(_ADAPTER.get(key, _is_plain)(option) for key, option in value.items())


def _is_plain(value: Any) -> bool:
    return _is_none_or(_is_text)(value) or _is_flag(value) or _is_number(value) or _are_texts(value)


def _is_none_or(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value)


_OPTIONS: Mapping[str, Callable[[Any], bool]] = {
    "skip_first_layers": _is_size,
    "skip_last_layers": _is_size,
    "skip": _are_texts,
    "max_shard_size": lambda value: _is_size(value) or _is_text(value),
    "quantize_lm_head": _is_flag,
}
_ADAPTER: Mapping[str, Callable[[Any], bool]] = {
    "enabled": _is_flag,
    "rank": _is_size,
    "alpha": _is_size,
    "dropout": lambda value: _is_number(value) and value < 1,
    "dtype": _is_none_or(_is_text),
    "target_modules": lambda value: _is_text(value) or _are_texts(value),
}
FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "schema_version": _is_size,
    "tool_version": _is_text,
    "source": _is_string,
    "revision": _is_none_or(_is_text),
    "files": _are_files,
    "format": _is_object,
    "layout": _is_text,
    "options": _are_options,
    "recipe": _is_object,
    "lora": _is_adapter,
    "sidecars": _are_sidecars,
}
"""Fields of a manifest but `tensors`, each with what says whether a value is one of its own."""

RECORD: Mapping[str, Callable[[Any], bool]] = {
    "decision": lambda value: value in ("quantize", "keep"),
    "reason": _is_string,
    "dtype": lambda value: isinstance(value, str) and value in BITS,
    "shape": _is_shape,
    "bits_per_weight": _is_number,
    "stored": _are_digests,
    "relative_error": _is_none_or(_is_number),
    "max_error": _is_none_or(_is_number),
    "output_error": _is_none_or(_is_number),
    "nearest_output_error": _is_none_or(_is_number),
}
"""The same of a tensor's record."""

REQUIRED = ("decision", "reason", "dtype", "shape", "bits_per_weight", "stored")
"""Fields that no record lacks."""
