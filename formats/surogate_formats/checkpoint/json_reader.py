"""A JSON object that may be large, read member by member.

What it holds is judged as it comes: a hostile text of any size costs no more than its first wrong member, and no
more of it is in memory than the longest member may take.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from surogate_formats.checkpoint.errors import JsonNestingError, JsonSyntaxError, JsonTooLargeError
from surogate_formats.checkpoint.strict_json import (
    check_depth,
    duplicate_key,
    encoding_error,
    make_decoder,
    not_an_object,
    syntax_error,
)

LONGEST_VALUE = 2**20
"""Characters of a value that is parsed whole: the record of a weight of 512 experts has half as many."""

_WINDOW = 2**15  # most values are far shorter; what is parsed in vain costs no more than this
_MOST_PARTS = 100_000  # in a longer one: lists and objects take tens of times their text's memory
_SPACE = re.compile(r"[ \t\n\r]*")

Read = Callable[[int], bytes]
"""Gives the next bytes, at most so many; none at the end."""


def reader_of(data: bytes | bytearray | memoryview) -> Read:
    """Reads bytes in memory."""
    view, position = memoryview(data), 0

    def read(count: int) -> bytes:
        nonlocal position
        piece = bytes(view[position : position + count])
        position += len(piece)
        return piece

    return read


class JsonReader:
    """Reads one object. After each key that `members` yields, its value must be read: by `members` again, or `value`.

    Raises:
        CheckpointError: What `strict_json.parse_object` raises, and `JsonTooLargeError` for a text longer than
            `LONGEST_VALUE` or a list or object longer than `longest`.
    """

    def __init__(self, read: Read, where: str, *, longest: int = LONGEST_VALUE) -> None:
        """Read from `read`; `where` is what the error messages name."""
        self._read = read
        self._where = where
        self._longest = longest
        self._decode = make_decoder(where).raw_decode
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._position = 0
        self._taken = 0  # bytes from `read`
        self._dropped = 0  # characters before `_text`
        self._ended = False

    def members(self) -> Iterator[str]:
        """The keys of the object that stands next."""
        if self.next() != "{":
            raise not_an_object(self._where, self.value())
        self._position += 1
        seen: set[str] = set()
        while self.next() != "}" or seen:
            if self.next() != '"':
                raise self._wrong("Expecting property name enclosed in double quotes")
            key = self.value()
            if key in seen:
                raise duplicate_key(self._where, key)
            seen.add(key)
            self._take(":")
            yield key
            if self.next() == "}":
                break
            self._take(",")
        self._position += 1

    def value(self) -> Any:
        """The value that stands next, whole."""
        first = self.next()
        self._fill(_WINDOW)
        found = self._parsed()
        if found is None:
            longest = LONGEST_VALUE if first == '"' else self._longest
            more = self._fill(longest)
            found = self._parsed() if more and not self._has_many_parts() else None
            if found is None or found[1] - self._position > longest:
                message = f"{self._where}: holds a value of more than {longest} characters, or of too many parts"
                raise JsonTooLargeError(f"{message}; download it again")
        value, self._position = found
        if isinstance(value, dict | list):
            check_depth(value, self._where)
        return value

    def _parsed(self) -> tuple[Any, int] | None:
        """The value that stands next and its end; None if it may go on after what was read."""
        try:
            value, end = self._decode(self._text, self._position)
        except json.JSONDecodeError as error:
            if not self._ended and (error.pos >= len(self._text) - 6 or error.msg.startswith("Unterminated")):
                return None
            raise syntax_error(self._where, error.msg, self._dropped + error.pos) from None
        except RecursionError:
            raise JsonNestingError(f"{self._where}: JSON nested too deep; download it again") from None
        # A number that is cut after "1e-" ends before it.
        return (value, end) if self._ended or end < len(self._text) - 3 else None

    def _has_many_parts(self) -> bool:
        return sum(self._text.count(mark, self._position) for mark in "[{,") > _MOST_PARTS

    def next(self) -> str:
        """The next character that is no space, which stays; none at the end."""
        start = self._dropped + self._position
        while True:
            self._position = _SPACE.match(self._text, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._text):
                return self._text[self._position]
            if self._ended:
                return ""
            if self._dropped + self._position - start > _WINDOW:
                raise self._wrong(f"Nothing but {_WINDOW} spaces")
            self._fill(_WINDOW)

    def end(self) -> None:
        """Refuse what follows the object."""
        if self.next():
            raise self._wrong("Extra data")

    def rest(self) -> Iterator[str]:
        """What follows the object, in pieces."""
        while True:
            yield self._text[self._position :]
            self._position = len(self._text)
            if self._ended:
                return
            self._fill(_WINDOW)

    def _take(self, mark: str) -> None:
        if self.next() != mark:
            raise self._wrong(f"Expecting {mark!r}")
        self._position += 1

    def _fill(self, wanted: int) -> bool:
        """Reads until so many characters stand in the text, or until the end; False if they stood there already."""
        if self._ended or len(self._text) - self._position >= wanted:
            return False
        pieces = [self._text[self._position :]]
        self._dropped += self._position
        self._position, missing = 0, 2 * wanted - len(pieces[0])
        while missing > 0 and not self._ended:
            data = self._read(missing)
            pieces.append(self._decoded(data))
            missing -= len(pieces[-1])
            self._ended = not data
        self._text = "".join(pieces)
        return True

    def _decoded(self, data: bytes) -> str:
        waiting = len(self._utf8.getstate()[0])
        try:
            text = self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise encoding_error(self._where, self._taken - waiting + error.start) from None
        self._taken += len(data)
        return text

    def _wrong(self, problem: str) -> JsonSyntaxError:
        return syntax_error(self._where, problem, self._dropped + self._position)
