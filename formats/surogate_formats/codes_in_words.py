"""How an artifact's codes were chosen, in words, from the options that a manifest records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

Codes = Literal["nearest", "search", "calibrated"]

CODES: tuple[Codes, ...] = get_args(Codes)
"""The ways in which codes and scales can be chosen."""

WRITTEN = "written by the model"
"""What `calibration_text` is where no file was given."""

HELD_OUT = 4
"""Rows of text beyond those that a pass solves on: the errors that it reports are measured on them."""

SHOWN = len("sha256 ") + 12
"""Characters of what `calibration_text` says of a file."""

_HOW = {
    "nearest": "nearest to the weights",
    "search": "searched: the scales with the least squared error",
    "calibrated": "calibrated",
}


def codes_in_words(options: Mapping[str, Any]) -> str:
    """One line: how codes were chosen, the adapter that was made with them, and the text, tokens and device of both.

    Args:
        options: of a manifest; older ones don't record `codes`, and have nearest ones.
    """
    codes, rank = options.get("codes", "nearest"), options.get("adapter_init")
    words = _HOW.get(codes, str(codes))
    if rank is not None:
        words += f", with an adapter of rank {rank} that starts from what is left of the error"
    if options.get("adapter_joint"):
        words += " (both chosen together: without the adapter the codes are worse)"
    if "calibration_tokens" not in options:
        return words
    text = options.get("calibration_text")
    source = "the model wrote itself" if text == WRITTEN else f"come from a text ({str(text)[:SHOWN]})"
    threads = options.get("calibration_threads")
    on = str(options.get("calibration_device"))
    on += f" with {threads} thread{'s' if threads > 1 else ''}" if isinstance(threads, int) else ""
    versions = f"torch {options.get('calibration_torch')}, transformers {options.get('calibration_transformers')}"
    return f"{words}; on {options['calibration_tokens']} tokens that {source}, run on {on} ({versions})"
