"""The files beside the weights: which of them go along, and config.json."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from pathlib import Path
from typing import Any

from surogate_formats.checkpoint.errors import shown
from surogate_formats.checkpoint.files import unreadable
from surogate_quantize.plan import Plan
from surogate_quantize.syncing import sync_directory

CARRIED = (
    "tokenizer*",
    "tekken.json",
    "*.spm",
    "*.codes",
    "normalizer.json",
    "dict.txt",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "*processor_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Names of files that a user of the artifact needs; weights, code and the source's card are not among them."""

TEMPLATES = "additional_chat_templates"


def carry_over(source: Path, target: Path) -> list[str]:
    """Copies the files (contents, never links) that go along; returns their names.

    Raises:
        UnreadableFileError: one of them may not be read.
    """
    names = sorted(entry.name for entry in source.iterdir() if entry.is_file() and is_carried(entry.name))
    for name in names:
        _copy(source / name, target / name)
    templates = sorted(entry for entry in (source / TEMPLATES).glob("*.jinja") if entry.is_file())
    if templates:
        (target / TEMPLATES).mkdir()
        for entry in templates:
            _copy(entry, target / TEMPLATES / entry.name)
        sync_directory(target / TEMPLATES)
        names.append(TEMPLATES)
    return names


def _copy(source: Path, target: Path) -> None:
    try:
        reader = source.open("rb")
    except OSError as error:
        raise unreadable(shown(source), error) from None
    with reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer)
        writer.flush()
        os.fsync(writer.fileno())


def is_carried(name: str) -> bool:
    """Whether a file of the source's directory goes along."""
    if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py")):
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in CARRIED)


def quantized_config(config: dict[str, Any], plan: Plan) -> bytes:
    """config.json of the artifact: the source's, and how it is quantized."""
    declared = plan.options.layout.quantization_config(plan.options.format, plan.kept_modules())
    return json.dumps({**config, "quantization_config": declared}, indent=2).encode() + b"\n"


def shard_names(count: int) -> list[str]:
    """File names of the shards, as transformers writes them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def shard_index(plan: Plan, names: list[str]) -> bytes:
    """`model.safetensors.index.json`."""
    weight_map = {stored.name: names[tensor.shard] for tensor in plan.tensors for stored in tensor.stored.values()}
    total = sum(tensor.stored_bytes for tensor in plan.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"
