"""From the specification's YAML to a model ready to train: quantizes once into a cache, loads, adds the adapter."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from surogate_formats.artifact import Artifact
from surogate_formats.errors import UsageError
from surogate_formats.format import to_dict
from surogate_formats.layouts import settle
from surogate_formats.manifest import MANIFEST_NAME
from surogate_formats.recipe import IncompatibleRecipeError, check_compatible
from surogate_formats.training_config import Lora, TrainingConfig, load_training_config, parameter_keys
from surogate_load.architecture import one_line
from surogate_load.errors import DifferentArtifactError, MissingExtraError, SourceMissingError
from surogate_load.hub_download import Repository
from surogate_load.load_keywords import SWITCHES
from surogate_load.loading import choose_recipe, load_model
from surogate_load.local import is_on_the_hub, local_directory
from surogate_load.quantized_cache import quantized_once

_LOG = logging.getLogger("surogate_load")


def from_config(
    path: str | Path,
    model: str | Path | None = None,
    *,
    recipe: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    emulate: bool = False,
    revision: str | None = None,
    token: str | None = None,
    **keywords: Any,
) -> Any:
    """Loads what a training file describes.

    Args:
        path: the YAML file. Keys that aren't ours are passed over with a warning; one that would mean something for
            what is loaded gets a line of its own.
        model: the source checkpoint, or an artifact that is what the file asks for: a directory, or a name on the Hub
            (a directory that exists wins); by default the one that the file names.
        recipe: instead of the file's.
        device: see `load_model`.
        dtype: see `load_model`.
        emulate: see `load_model`.
        revision: branch, tag or commit on the Hub.
        token: for the Hub; None takes HF_TOKEN or the stored login.
        keywords: switches of the recipe, over those of the file; or else for `load_model`.

    Returns:
        The transformers model, or with `lora: true` the PEFT model around it. Its adapters are kept in float32, as PEFT
        does, or with `lora_dtype: bf16` in bfloat16.

    Raises:
        SourceMissingError: neither the file nor the caller names a model.
        NoSuchSourceError: it is no directory, and can't be a name on the Hub.
        DifferentArtifactError: the model is an artifact, and not what the file asks for.
        QuantizerFailedError: the quantizer, which runs as a process of its own, failed; so it does without a source.
        Everything that `load_training_config` and `load_model` raise.
    """
    config = load_training_config(path)
    source = model or config.model
    if source is None:
        raise SourceMissingError(f"{path}: names no model; pass from_config(..., model=DIR)")
    switches = {key: keywords.pop(key) for key in SWITCHES if key in keywords}
    config = replace(config, recipe=choose_recipe(config.recipe, recipe, switches))
    artifact = _artifact(Path(path), _found(source, revision, token), config)
    _report_keys(path, config, keywords)
    settings = asdict(config.recipe)
    loaded = load_model(artifact, settings.pop("name"), device, dtype, emulate, **settings, **keywords)
    return _with_adapter(loaded, config.lora, path) if config.lora.enabled else loaded


def _found(model: str | Path, revision: str | None, token: str | None) -> Path | Repository:
    """A directory, downloaded where it is a packed one on the Hub; or a repository that is still to be quantized."""
    if not is_on_the_hub(model):
        return local_directory(model, revision)
    repository = Repository.resolve(str(model), revision, token, packed=False)
    return repository.whole() if repository.is_packed else repository


def _artifact(path: Path, source: Path | Repository, config: TrainingConfig) -> Path:
    """The artifact that the file asks for: the source itself if it is one, else the one in the cache."""
    if isinstance(source, Path) and (source / MANIFEST_NAME).is_file():
        _check_artifact(path, source, config)
        return source
    if config.format_name is None:
        raise UsageError(f"{path}: no format is on; set qlora_bnb, qlora_fp4 or qlora_fp8 to true")
    _check_recipe(path, config.format_name, config)
    return quantized_once(path, source, config)


def _check_recipe(path: Path, format_name: str, config: TrainingConfig) -> None:
    try:
        check_compatible(format_name, config.recipe)
    except IncompatibleRecipeError as error:
        raise IncompatibleRecipeError(f"{path}: {error}") from error


def _check_artifact(path: Path, source: Path, config: TrainingConfig) -> None:
    """Raises `DifferentArtifactError` unless the artifact is what the file asks for, in all that its keys can say.

    A file that turns no format on asks for none.
    """
    with Artifact.open(source) as opened:
        found, options = to_dict(opened.format), opened.manifest.options
    _check_recipe(path, found["name"], config)
    if config.format_name is None:
        return
    wanted = to_dict(settle(config.format_name, config.parameters)[0])
    keys = parameter_keys(config.format_name) if wanted["name"] == found["name"] else {}
    compared = [("the format", wanted["name"], found["name"])]
    compared += [(f"{key} ({name})", wanted[name], found[name]) for name, key in keys.items()]
    for end, blocks in (("first", config.skip_first_layers), ("last", config.skip_last_layers)):
        compared.append((f"skip_quant_{end}_layers", blocks, options.get(f"skip_{end}_layers", 0)))
    for what, asked, has in compared:
        if asked != has:
            raise DifferentArtifactError(
                f"{path}: {what} is {asked} here, but {source} was packed with {has}: "
                "change the file, or have it name the source checkpoint as model"
            )


def _report_keys(path: str | Path, config: TrainingConfig, passed: Collection[str]) -> None:
    for key, advice in config.without_effect.items():
        if key not in passed:
            _LOG.warning("%s: %s has no effect here: %s", path, key, advice)
    others = [key for key in config.ignored if key not in config.without_effect]
    if others:
        _LOG.warning("%s: not ours, passed over: %s", path, ", ".join(others))


def _with_adapter(model: Any, lora: Lora, path: str | Path) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft is not installed: pip install surogate-quant[train]") from error
    if lora.dtype == "bfloat16" and model.dtype != torch.bfloat16:
        raise UsageError(f"{path}: lora_dtype bf16 needs a bf16 model, and this one is {model.dtype}; pass dtype=")
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, settings, autocast_adapter_dtype=lora.dtype != "bfloat16")
    except ValueError as error:
        raise UsageError(f"{path}: lora_target_modules: {one_line(error)}") from error
