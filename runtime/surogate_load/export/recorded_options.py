"""What a manifest records of the request that made its artifact, as the quantizer takes it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surogate_formats.manifest import Manifest
from surogate_formats.training_config import KEYS
from surogate_load.publishing.command import FLAGS


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
