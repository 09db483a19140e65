"""Loads an artifact as a transformers model whose frozen base stays packed."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from surogate_formats.artifact import Artifact
from surogate_formats.errors import UsageError
from surogate_formats.recipe import RECIPES, Recipe, check_compatible
from surogate_load.errors import (
    DeviceUnavailableError,
    MismatchedModelError,
    MissingExtraError,
    UnknownArchitectureError,
)
from surogate_load.training import set_recipe
from surogate_load.weight import TORCH_DTYPES

_SWITCHES = tuple(field.name for field in fields(Recipe) if field.name != "name")


def load_model(
    artifact: str | Path,
    recipe: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    emulate: bool = False,
    **switches: Any,
) -> Any:
    """Loads an artifact for training adapters on it, with `peft.get_peft_model` or otherwise.

    Args:
        artifact: the directory that surogate-quantize wrote.
        recipe: `bf16`, `fp8-hybrid` or `nvfp4`; by default the one that the artifact records.
        device: where the model goes.
        dtype: of what isn't quantized, and of the products; by default that of the source.
        emulate: compute fp8 and fp4 products in float32 from the same quantized operands, on any device.
        switches: fields of `surogate_formats.recipe.Recipe`, over those that the artifact records.

    Returns:
        A transformers model in evaluation mode, all of its parameters frozen.

    Raises:
        UsageError: an unknown recipe or switch, or a format and a recipe that don't go together.
        DeviceUnavailableError: torch can't reach the device.
        UnsupportedDeviceError: the device can't run the recipe, and `emulate` is off.
        UnknownArchitectureError: transformers can't make a model from config.json.
        ArtifactError, CheckpointError: the artifact is damaged, or is not this model's.
        MissingExtraError: transformers is not installed.
    """
    with Artifact.open(artifact) as opened:
        chosen = choose_recipe(opened.recipe, recipe, switches)
        check_compatible(opened.format.name, chosen)
        model = _read_model(opened, _reachable(device), dtype or _source_dtype(opened))
    model.requires_grad_(False)
    set_recipe(model, chosen, emulate=emulate)
    return model


def choose_recipe(recorded: Recipe, name: str | None, switches: dict[str, Any]) -> Recipe:
    """The recorded recipe with another name or switches; an unknown one is a `UsageError` that names the nearest."""
    for switch in switches:
        if switch not in _SWITCHES:
            raise UsageError(f"load_model: no switch {switch!r}; {_nearest(switch, _SWITCHES)}")
    if name is not None and name not in RECIPES:
        raise UsageError(f"load_model: no recipe {name!r}; {_nearest(name, RECIPES)}")
    lowered = {key: value.lower() if isinstance(value, str) else value for key, value in switches.items()}
    chosen: dict[str, Any] = lowered if name is None else {**lowered, "name": name}
    return replace(recorded, **chosen)


def _reachable(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
        raise DeviceUnavailableError(f"device {device}: {one_line(error)}; choose another, such as cpu") from error
    return chosen


def one_line(error: BaseException) -> str:
    """The first line of another library's message, without the full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".:")


def _nearest(word: str, known: tuple[str, ...]) -> str:
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _source_dtype(artifact: Artifact) -> torch.dtype:
    """The dtype that config.json declares, else the commonest of the weights that were quantized."""
    declared = artifact.config.get("dtype") or artifact.config.get("torch_dtype")
    if isinstance(declared, str) and isinstance(getattr(torch, declared, None), torch.dtype):
        dtype: torch.dtype = getattr(torch, declared)
        return dtype
    records = artifact.manifest.tensors.values()
    dtypes = Counter(record.dtype for record in records if record.decision == "quantize")
    return TORCH_DTYPES[dtypes.most_common(1)[0][0]]


def need_transformers() -> Any:
    """The package transformers; `MissingExtraError` if it isn't installed."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers is not installed: pip install surogate-quant[train]") from error
    return transformers


def model_class(config: dict[str, Any]) -> Any:
    """The architecture that a config.json names; without one, what transformers trains as a causal language model."""
    transformers = need_transformers()
    names = [name for name in config.get("architectures") or () if isinstance(name, str)]
    known = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    return known[0] if known else transformers.AutoModelForCausalLM


def _read_model(artifact: Artifact, device: torch.device, dtype: torch.dtype) -> Any:
    transformers = need_transformers()
    # First, and by itself: our hook on it imports the plug-in, which must not be half imported then.
    importlib.import_module("transformers.quantizers.auto")
    from surogate_load.hf_quantizer import claim

    path = str(artifact.path)
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except ValueError as error:
        raise UnknownArchitectureError(
            f"{path}: transformers {transformers.__version__} knows no model_type "
            f"{artifact.config.get('model_type')!r} ({one_line(error)}); try a newer transformers"
        ) from error
    config.quantization_config = claim(artifact.config["quantization_config"])
    placement = {} if device.type == "cpu" else {"device_map": {"": device}}
    model, report = model_class(artifact.config).from_pretrained(
        path, config=config, dtype=dtype, output_loading_info=True, local_files_only=True, **placement
    )
    _check_report(artifact, report)
    return model


def _check_report(artifact: Artifact, report: dict[str, Any]) -> None:
    """Raises where transformers would only warn, and go on with random weights."""
    for problem, text in {
        "missing_keys": "the model needs {name}, which the artifact doesn't hold",
        "unexpected_keys": "the artifact holds {name}, which the model has no place for",
        "mismatched_keys": "{name} has another shape in the model",
        "conversion_errors": "{name} can't be converted for the model",
    }.items():
        names = sorted(str(name) for name in report.get(problem) or ())
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise MismatchedModelError(f"{artifact.path}: {text.format(name=names[0])}{more}")
