"""A training file's YAML as a mapping: plain data, every key once, and one line for whatever is wrong."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from surogate_formats.errors import UsageError

LARGEST_FILE = 1 << 20
"""Bytes; a training file is a page of text."""


class TrainingConfigError(UsageError):
    """A training file that can't be read, or a key of ours with a value that it can't have."""


class _StrictLoader(yaml.SafeLoader):
    """Plain data only: no anchors (a page of them can expand to gigabytes) and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="anchors are not supported", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below, by PyYAML
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_mapping(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds.

    Raises:
        TrainingConfigError: it can't be read, is larger than `LARGEST_FILE`, no YAML (the message gives line and
            column), or no mapping.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise TrainingConfigError(f"{path}: larger than {LARGEST_FILE} bytes; this is no training file")
        data = yaml.load(path.read_text("utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise TrainingConfigError(f"{path}: can't be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        raise TrainingConfigError(f"{path}: no YAML that we read ({_reason(error)})") from error
    if not isinstance(data, dict):
        raise TrainingConfigError(f"{path}: not a mapping of keys to values")
    return data


def _reason(error: Exception) -> str:
    """PyYAML's complaint with its place, without the excerpt that it prints over several lines."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}"
