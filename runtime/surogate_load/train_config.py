"""From the specification's YAML to a model ready to train: quantizes once into a cache, loads, adds the adapter."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.errors import UsageError
from surogate_formats.manifest import MANIFEST_NAME
from surogate_formats.training_config import Lora, TrainingConfig, load_training_config
from surogate_load.errors import MissingExtraError, QuantizerFailedError, SourceMissingError
from surogate_load.loading import load_model

_LOG = logging.getLogger("surogate_load")

_KEY_LENGTH = 24


def from_config(
    path: str | Path,
    model: str | Path | None = None,
    *,
    recipe: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    emulate: bool = False,
    **switches: Any,
) -> Any:
    """Loads what a training file describes.

    Args:
        path: the YAML file; keys that aren't ours are passed over.
        model: directory of the source checkpoint; by default the one that the file names.
        recipe: instead of the file's.
        device: see `load_model`.
        dtype: see `load_model`.
        emulate: see `load_model`.
        switches: over those of the file.

    Returns:
        The transformers model, or with `lora: true` the PEFT model around it.

    Raises:
        SourceMissingError: neither the file nor the caller names a model.
        QuantizerFailedError: the quantizer, which runs as a process of its own, failed.
        Everything that `load_training_config` and `load_model` raise.
    """
    config = load_training_config(path)
    source = model or config.model
    if source is None:
        raise SourceMissingError(f"{path}: names no model; pass from_config(..., model=DIR)")
    if config.format_name is None:
        raise UsageError(f"{path}: no format is on; set qlora_bnb, qlora_fp4 or qlora_fp8 to true")
    artifact = quantized_once(Path(path), Path(source), config)
    settings = {key: value for key, value in asdict(config.recipe).items() if key != "name"}
    loaded = load_model(artifact, recipe or config.recipe.name, device, dtype, emulate, **{**settings, **switches})
    return _with_adapter(loaded, config.lora) if config.lora.enabled else loaded


def cache_directory() -> Path:
    """Where artifacts are kept: `$SUROGATE_CACHE`, else `~/.cache/surogate-quant`."""
    chosen = os.environ.get("SUROGATE_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "surogate-quant"


def quantized_once(path: Path, source: Path, config: TrainingConfig) -> Path:
    """The artifact of a source under a training file; made if the cache doesn't hold it yet. Says where it is."""
    out = cache_directory() / cache_key(source, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):  # every rank of a distributed run arrives here
        if not (out / MANIFEST_NAME).is_file():
            _LOG.warning("quantizing %s to %s, once, into %s", source, config.format_name, out)
            _quantize(path, source, out)
        else:
            _LOG.warning("using the quantized base in %s", out)
    return out


def cache_key(source: Path, config: TrainingConfig) -> str:
    """Names an artifact by all that its weights depend on: the source's files, the format, the layers, our version.

    A file is known by size, header and time of change: a checkpoint trained further has the same header and size.
    """
    with Checkpoint.open(source) as checkpoint:
        files = [[*asdict(file).values(), (source / file.name).stat().st_mtime_ns] for file in checkpoint.files]
        settings = hashlib.sha256(checkpoint.config_bytes).hexdigest()
    layers = [config.skip_first_layers, config.skip_last_layers]
    options = [config.format_name, dict(config.parameters), layers, _version()]
    text = json.dumps([files, settings, options], sort_keys=True)
    return f"{source.resolve().name}-{hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]}"


def _version() -> str:
    try:
        return version("surogate-quant")
    except PackageNotFoundError:  # run from the source tree
        return ""


def _quantize(path: Path, source: Path, out: Path) -> None:
    command = [sys.executable, "-m", "surogate_quantize", str(source), "--config", str(path), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    last = ""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stderr or ():
            last = line.strip() or last
            _LOG.info("%s", last)
    if process.returncode:
        raise QuantizerFailedError(f"{source} can't be quantized: {last.removeprefix('Error: ')}")


def _with_adapter(model: Any, lora: Lora) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft is not installed: pip install surogate-quant[train]") from error
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)
