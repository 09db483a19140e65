"""Artifacts that a training file asks for: found, or made once into a cache by the quantizer, a process of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.manifest import MANIFEST_NAME
from surogate_formats.training_config import KEYS, TrainingConfig
from surogate_formats.version import VERSION
from surogate_load.errors import NoSuchSourceError, QuantizerFailedError
from surogate_load.hub_download import Repository

_LOG = logging.getLogger("surogate_load")

_OF_A_RANK = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
"""Variables by which torchrun tells a process its rank."""

_KEY_LENGTH = 24


def cache_directory() -> Path:
    """Where artifacts are kept: `$SUROGATE_CACHE`, else `~/.cache/surogate-quant`."""
    chosen = os.environ.get("SUROGATE_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "surogate-quant"


def quantized_once(path: Path, source: Path | Repository, config: TrainingConfig) -> Path:
    """The artifact of a source under a training file; made if the cache doesn't hold it yet. Says where it is."""
    if isinstance(source, Path) and not source.exists():
        raise NoSuchSourceError(f"{source}: no such directory, and no name on the Hub, such as Qwen/Qwen3-4B")
    out = cache_directory() / cache_key(source, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):  # every rank of a distributed run arrives here
        if not (out / MANIFEST_NAME).is_file():
            _LOG.warning("quantizing %s to %s, once, into %s", _name(source), config.format_name, out)
            # a killed run leaves an unfinished directory
            _run_quantizer(path, source, config, "--out", str(out), "--overwrite")
        else:
            _LOG.warning("using the quantized base in %s", out)
    return out


def cache_key(source: Path | Repository, config: TrainingConfig) -> str:
    """Names an artifact by all that its weights depend on: the source's files, the format, the layers, our version.

    A file is known by size, header and time of change: a checkpoint trained further has the same header and size. A
    repository is known by its commit.
    """
    files, settings = _identity(source)
    layers = [config.skip_first_layers, config.skip_last_layers]
    options = [config.format_name, dict(config.parameters), layers, _version()]
    text = json.dumps([files, settings, options], sort_keys=True)
    stem = _name(source).rpartition("/")[2] if isinstance(source, Repository) else source.resolve().name
    return f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]}"


def _identity(source: Path | Repository) -> tuple[list[Any], str]:
    if isinstance(source, Repository):
        return [source.name, source.commit], ""
    with Checkpoint.open(source) as checkpoint:
        files = [[*asdict(file).values(), (source / file.name).stat().st_mtime_ns] for file in checkpoint.files]
        return files, hashlib.sha256(checkpoint.config_bytes).hexdigest()


def _name(source: Path | Repository) -> str:
    return source.name if isinstance(source, Repository) else str(source)


def _version() -> str:
    try:
        return version("surogate-quant")
    except PackageNotFoundError:  # run from the source tree
        return VERSION


def _run_quantizer(path: Path, source: Path | Repository, config: TrainingConfig, *arguments: str) -> None:
    """Runs the quantizer on the training file's keys of ours, with the recipe that was settled."""
    data = yaml.safe_load(path.read_text("utf-8"))
    ours = {**{key: value for key, value in data.items() if key in KEYS}, "recipe": config.recipe.name}
    with tempfile.TemporaryDirectory() as folder:
        settled = Path(folder) / path.name
        settled.write_text(yaml.safe_dump(ours), "utf-8")
        command = [sys.executable, "-m", "surogate_quantize", _name(source), "--config", str(settled), *arguments]
        extra = {}
        if isinstance(source, Repository):
            command, extra = [*command, "--revision", source.commit], _token(source)
        code, reason = _run(command, extra)
    if code:
        raise QuantizerFailedError(f"{_name(source)} can't be quantized: {reason}")


def _token(source: Repository) -> dict[str, str]:
    """A token that the caller gave, for the environment: a command line is seen by everyone."""
    return {"HF_TOKEN": source.api.token} if isinstance(source.api.token, str) else {}


def _run(command: list[str], extra: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit code, and the error's line or else the last one of stderr; the lines are logged as they come."""
    # It is no rank of the training run, though torchrun's variables would make it one.
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    environment = {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(extra or {})}
    last = failure = ""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stderr or ():
            last = line.strip() or last
            failure = last.removeprefix("Error: ") if last.startswith("Error: ") else failure
            _LOG.info("%s", last)
    return process.returncode, failure or last
