"""A file of calibration text, a piece at a time: it may be larger than memory, and a pass takes little of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from surogate_formats.errors import UsageError
from surogate_load.architecture import one_line

CHUNK = 1 << 20
"""Characters that are read at a time; a piece of text has up to three times as many, where its lines are so long."""


class CalibrationTextError(UsageError):
    """There is no text to calibrate on, or none that can be used."""


def text_pieces(path: Path) -> Iterator[str | list[int]]:
    """What a file holds, in its order: lines of text, many in a piece, or the text or the ids of each JSON line.

    Pieces depend on the file alone, not on what is taken of it, so that more tokens begin with those of fewer. A
    tokenizer may take both ends of each for those of a text; elsewhere it gives what it would for the whole.

    Raises:
        CalibrationTextError: it can't be read; only what is taken is looked at.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix != ".jsonl":
                yield from _chunks(file)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _of_line(json.loads(line), f"{path}, line {number}")
    except UnicodeDecodeError as error:  # its position would be one in what happens to be in memory
        bad = f"is no UTF-8: byte 0x{error.object[error.start]:02x}, {error.reason}"
        raise CalibrationTextError(f"`calibration_text` {path}: can't be read ({bad})") from error
    except (OSError, ValueError, RecursionError) as error:  # a number of 5000 digits is no JSONDecodeError
        raise CalibrationTextError(f"`calibration_text` {path}: can't be read ({one_line(error)})") from error


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file of text.

    Raises:
        CalibrationTextError: it can't be read.
    """
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
        return digest.hexdigest()
    except OSError as error:
        raise CalibrationTextError(f"`calibration_text` {path}: can't be read ({error.strerror}); check it") from error


def _chunks(file: TextIO) -> Iterator[str]:
    left = ""
    while more := file.read(CHUNK):
        left += more
        if len(more) == CHUNK:
            cut = _cut(left)
            yield left[:cut]
            left = left[cut:]
    yield left


def _cut(text: str) -> int:
    """Behind the last line that another follows; in one that is too long before its last word, if it has several.

    Line ends that follow each other stay together, and a space with its word: tokenizers make one token of them.
    """
    return text.rstrip("\n").rfind("\n") + 1 or max(text.rfind(" "), 0) or len(text)


def _of_line(data: Any, where: str) -> str | list[int]:
    if isinstance(data, dict) and isinstance(data.get("text"), str):
        text: str = data["text"]
        return text
    ids = data.get("input_ids") if isinstance(data, dict) else None
    if isinstance(ids, list) and all(type(token) is int and 0 <= token < 1 << 31 for token in ids):
        return ids
    raise CalibrationTextError(f"`calibration_text` {where}: is no object with `text` or `input_ids`")
