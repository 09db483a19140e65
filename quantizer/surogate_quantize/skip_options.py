"""The user's own exceptions: `--skip PATTERN`, `--skip-first-layers N`, `--skip-last-layers N`."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from surogate_formats.errors import UsageError


class InvalidSkipPatternError(UsageError):
    """A `--skip` pattern is empty or not a regular expression."""


class UnknownSkipPatternError(UsageError):
    """A `--skip` pattern matches no tensor of the checkpoint."""


class SkipLayersError(UsageError):
    """`--skip-first-layers` and `--skip-last-layers` are negative, or ask for more blocks than the model has."""


@dataclass(frozen=True)
class SkipOptions:
    """What the user wants to keep in the source's dtype, besides what is always kept.

    Attributes:
        first_layers: number of blocks at the start of each stack of blocks.
        last_layers: number of blocks at its end.
        patterns: dotted names (`layers.0.mlp`), with `*` for any part of one component, or `re:` and a regular
            expression that is searched in the full module name.
    """

    first_layers: int = 0
    last_layers: int = 0
    patterns: tuple[str, ...] = ()


Matcher = Callable[[str], bool]


def module_name(tensor: str) -> str:
    """Return the module that owns a tensor: its name without the last component if that is `weight` or `bias`."""
    parent, _, parameter = tensor.rpartition(".")
    return parent if parameter in {"weight", "bias"} else tensor


def compile_pattern(pattern: str) -> Matcher:
    """Turn one `--skip` pattern into a test of tensor names.

    A plain pattern matches consecutive components anywhere in the name, whole ones only: `layers.1` matches
    `model.layers.1.mlp` and not `model.layers.10.mlp`.

    Raises:
        InvalidSkipPatternError: the pattern, or one of its components, is empty, or its regex doesn't compile.
    """
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as error:
            raise InvalidSkipPatternError(f"`skip` {pattern}: not a regular expression: {error}") from None
        return lambda tensor: regex.search(module_name(tensor)) is not None
    components = pattern.split(".")
    if not all(components):
        raise InvalidSkipPatternError(f"`skip` {pattern!r}: empty component; write names like layers.0.mlp")
    body = r"\.".join("[^.]*".join(map(re.escape, component.split("*"))) for component in components)
    dotted = re.compile(rf"(?:^|\.){body}(?=\.|$)")
    return lambda tensor: dotted.search(tensor) is not None


def match_patterns(patterns: Sequence[str], tensors: Iterable[str]) -> dict[str, str]:
    """Return the tensors that a `--skip` pattern names, each with the first pattern that does.

    Raises:
        InvalidSkipPatternError: see `compile_pattern`.
        UnknownSkipPatternError: a pattern matches no tensor; a misspelling would otherwise go unnoticed.
    """
    names = list(tensors)
    matched: dict[str, str] = {}
    for pattern in patterns:
        matches = list(filter(compile_pattern(pattern), names))
        if not matches:
            raise UnknownSkipPatternError(f"`skip` {pattern}: matches no tensor; {_suggestion(pattern, names)}")
        for name in matches:
            matched.setdefault(name, pattern)
    return matched


def _suggestion(pattern: str, names: Sequence[str]) -> str:
    """Name the components of the checkpoint that look like the pattern's."""
    if pattern.startswith("re:"):
        return "it is searched in full module names such as " + module_name(names[0] if names else "")
    known = sorted({component for name in names for component in name.split(".") if not component.isdigit()})
    near = [
        close
        for component in pattern.split(".")
        if component not in known and not component.isdigit()
        for close in difflib.get_close_matches(component, known, n=3)
    ]
    return f"did you mean {', '.join(near)}?" if near else "`dry_run` lists every name"
