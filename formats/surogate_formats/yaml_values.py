"""Parsers of a training file's values: the value in our terms, or a `ValueError` that says what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ALL_LINEAR = "all-linear"
"""Every linear layer of the blocks: what PEFT calls so."""


def boolean(value: Any) -> bool:
    """True or false, and no other word for them."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def count(value: Any) -> int:
    """A whole number, not negative, that 32 bits hold."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError("a whole number, not negative")
    return value


def text(value: Any) -> str:
    """A text that isn't empty."""
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("a text")
    return value


def fraction(value: Any) -> float:
    """A number from 0 to below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError("a number from 0 to below 1")
    return float(value)


def adapter_dtype(value: Any) -> str:
    """Torch's name of a dtype that adapters can have."""
    names = {"fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}
    if not isinstance(value, str) or value.lower() not in names:
        raise ValueError("fp32 or bf16")
    return names[value.lower()]


def module_names(value: Any) -> str | tuple[str, ...]:
    """`all-linear`, or names of modules; one name may stand alone."""
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name and name.isprintable() for name in names):
        raise ValueError(f"{ALL_LINEAR}, or a list of module names")
    return ALL_LINEAR if names in (["all"], [ALL_LINEAR]) else tuple(names)


def one_of(*names: str) -> Callable[[Any], str]:
    """A parser that takes one of these names, in any case, `_` and `-` alike."""

    def parse(value: Any) -> str:
        spelled = value.lower().replace("_", "-") if isinstance(value, str) else value
        for name in names:
            if spelled == name.replace("_", "-"):
                return name
        raise ValueError(f"one of {', '.join(names)}")

    return parse
