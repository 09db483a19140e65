"""A training file's YAML as a mapping: plain data, every key once, and one line for whatever is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from surogate_formats.checkpoint.errors import NotARegularFileError, shown
from surogate_formats.checkpoint.files import open_regular, read_whole
from surogate_formats.errors import CheckpointError, UsageError

LARGEST_FILE = 1 << 16
"""Bytes; a training file is a page of text, and PyYAML takes a microsecond a byte."""

MOST_NODES = 3000
"""Keys, values and lists of a file; the longest name hundreds of modules."""

MOST_LEVELS = 32
"""Of nesting."""

# In YAML 1.1 an octal number and one in base 60: what their writers seldom mean.
_OTHER_BASES = re.compile(r"[-+]?0[0-9_]+|.*:.*")


_TOO_DEEP = f"more than {MOST_LEVELS} levels of nesting"


class TrainingConfigError(UsageError):
    """A training file that can't be read, or a key of ours with a value that it can't have."""


class _StrictLoader(yaml.SafeLoader):
    """Plain data only: no tags, no anchors (a page of them can expand to gigabytes) and no key twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._nodes += 1
        self._levels += 1
        if isinstance(event, yaml.AliasEvent):
            problem = "anchors are not supported"
        elif event.tag is not None:
            problem = "tags are not supported"
        elif self._nodes > MOST_NODES:
            problem = f"more than {MOST_NODES} values"
        elif self._levels > MOST_LEVELS:
            problem = _TOO_DEEP
        else:
            node = super().compose_node(parent, index)
            self._levels -= 1
            return node
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        # Before a node is composed, PyYAML looks ahead through a thousand brackets, and at all of them for each.
        if self.flow_level >= MOST_LEVELS:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below, by PyYAML
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r:.80} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: Any) -> Any:
        if _OTHER_BASES.fullmatch(node.value):
            return self.construct_scalar(node)
        kind = node.tag.rpartition(":")[2]
        return self.construct_yaml_int(node) if kind == "int" else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_number)


def read_mapping(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds.

    Raises:
        TrainingConfigError: it can't be read, is larger than `LARGEST_FILE`, no YAML of plain data (the message gives
            line and column), or no mapping with printable keys.
    """
    where = shown(path)
    try:
        data = yaml.load(_read(path, where).decode("utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise TrainingConfigError(f"{where}: can't be read ({error.strerror}); check the path") from error
    except NotARegularFileError as error:
        raise TrainingConfigError(f"{where}: a directory, a pipe or a device; check the path") from error
    except CheckpointError as error:
        raise TrainingConfigError(str(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        raise TrainingConfigError(f"{where}: no YAML that we read ({_reason(error)})") from error
    if not isinstance(data, dict):
        raise TrainingConfigError(f"{where}: not a mapping of keys to values")
    odd = next((key for key in data if not str(key).isprintable()), None)
    if odd is not None:
        raise TrainingConfigError(f"{where}: the key {odd!r:.80} holds unprintable characters")
    return data


def _read(path: Path, where: str) -> bytes:
    descriptor = open_regular(path, where)
    try:
        message = f"{where}: larger than {LARGEST_FILE} bytes; this is no training file"
        return read_whole(descriptor, where, LARGEST_FILE, lambda size: TrainingConfigError(message))
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    """PyYAML's complaint with its place, without the excerpt that it prints over several lines."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return shown(" ".join(str(error).split()))[:200]
    return f"line {mark.line + 1}, column {mark.column + 1}: {shown(' '.join(problem.split()))[:200]}"
