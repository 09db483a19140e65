"""What a manifest records of the request that made its artifact, as the quantizer takes it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surogate_formats.codes_in_words import WRITTEN
from surogate_formats.errors import UsageError
from surogate_formats.manifest import Manifest
from surogate_formats.training_config import KEYS
from surogate_load.publishing.command import FLAGS, tokens_asked_for


class CalibrationTextGoneError(UsageError):
    """Codes were calibrated on a file, of which an artifact holds no more than the SHA-256."""


def quantizer_arguments(manifest: Manifest) -> list[str]:
    """The options of surogate-quantize that shaped an artifact, but for those that a training file alone can give."""
    options = manifest.options
    words = ["--format", manifest.format["name"], "--layout", manifest.layout]
    for name, flag in FLAGS.items():
        words += flag(manifest.format[name]) if name in manifest.format else []
    for name in ("skip_first_layers", "skip_last_layers", "max_shard_size"):
        words += [f"--{name.replace('_', '-')}", str(options[name])] if options.get(name) else []
    for pattern in options.get("skip", ()):
        words += ["--skip", pattern]
    return [*words, *(["--quantize-lm-head"] if options.get("quantize_lm_head") else [])]


def code_arguments(manifest: Manifest, codes: str | None, text: str | Path | None) -> list[str]:
    """How surogate-quantize is to choose codes: as an artifact's were chosen, or as `codes` says.

    Args:
        manifest: of the artifact.
        codes: nearest, search or calibrated; None is what the manifest records.
        text: a file to calibrate on; None is text that the model writes itself.

    Raises:
        UsageError: a text for codes that need none.
        CalibrationTextGoneError: the artifact was calibrated on a file, and there is none here.
    """
    options = manifest.options
    chosen = codes or options.get("codes", "nearest")
    if chosen != "calibrated":
        if text is not None:
            raise UsageError(f"--calibration-text: codes that are {chosen} need no text; add --codes calibrated")
        return ["--codes", chosen]
    recorded = options.get("calibration_text", WRITTEN)
    if text is None and codes is None and recorded != WRITTEN:
        raise CalibrationTextGoneError(
            f"its codes were calibrated on a file ({recorded}); give it as --calibration-text, or choose --codes"
        )
    tokens = tokens_asked_for(options)
    words = ["--codes", chosen, *(["--calibration-tokens", str(tokens)] if tokens else [])]
    return [*words, *(["--calibration-text", str(text)] if text is not None else [])]


def training_settings(manifest: Manifest) -> dict[str, Any]:
    """The keys of a training file that record an artifact's recipe and adapter."""
    recorded: Mapping[str, Mapping[str, Any]] = {"recipe": manifest.recipe, "lora": manifest.lora}
    found = {}
    for key, entry in KEYS.items():
        section, _, name = entry.targets[0].partition(".")
        value = recorded.get(section, {}).get(name)
        if value is not None:
            found[key] = list(value) if isinstance(value, tuple) else value
    return found
