"""The command that makes an artifact again, from its manifest: no path, host or token of whoever made it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from surogate_formats.codes_in_words import HELD_OUT, WRITTEN
from surogate_formats.manifest import Manifest

FLAGS: Mapping[str, Callable[[Any], list[str]]] = {
    "block_size": lambda value: ["--block-size", str(value)],
    "double_quant": lambda value: ["--no-double-quant" if value == "none" else "--double-quant"],
    "scaling": lambda value: ["--scaling", value],
    "two_d": lambda value: ["--2d" if value else "--1d"],
    "four_over_six": lambda value: ["--four-over-six" if value else "--no-four-over-six"],
    "metric": lambda value: ["--four-over-six-metric", value],
    "global_scale": lambda value: ["--global-scale", value],
}
"""Parameters of formats that a user sets; the layout sets the others."""


def command_of(manifest: Manifest) -> str:
    """`surogate-quantize` with every option that shaped the artifact, and what must be filled in.

    That is `--out`, and the file of a text that was calibrated on.
    """
    source = manifest.source if "/" in manifest.source else f"./{manifest.source}"
    words = ["surogate-quantize", source]
    words += ["--revision", manifest.revision] if manifest.revision else []
    words += ["--format", manifest.format["name"], "--layout", manifest.layout]
    for name, flag in FLAGS.items():
        if name in manifest.format:
            words += flag(manifest.format[name])
    for name, value in _given(manifest.options).items():
        words += _option(f"--{name.replace('_', '-')}", value)
    words += ["--hash-source"] if any(file.sha256 for file in manifest.files) else []
    return shlex.join([*words, "--out", "DIR"])


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a user gives: of a calibrated pass the manifest records what came of them, too."""
    found = {name: value for name, value in options.items() if not name.startswith("calibration_")}
    if "calibration_tokens" in options:
        found["calibration_tokens"] = tokens_asked_for(options)
        found["calibration_text"] = None if options.get("calibration_text") == WRITTEN else "FILE"
    return found


def tokens_asked_for(options: Mapping[str, Any]) -> int:
    """`--calibration-tokens` that gave what a manifest records: rows that are held out came on top of them."""
    recorded = int(options.get("calibration_tokens") or 0)
    return max(recorded - HELD_OUT * (options.get("calibration_row") or 0), 0)


def _option(flag: str, value: Any) -> list[str]:
    """A recorded option as it is given on the command line; one that is off, zero or empty isn't given."""
    if isinstance(value, list | tuple):
        return [word for item in value for word in (flag, str(item))]
    if value is True:
        return [flag]
    return [flag, str(value)] if value else []
