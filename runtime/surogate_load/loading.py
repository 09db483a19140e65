"""Loads an artifact as a transformers model whose frozen base stays packed."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from surogate_formats.artifact import ADAPTER, Artifact
from surogate_formats.artifact_values import check_scales
from surogate_formats.errors import UsageError
from surogate_formats.recipe import RECIPES, Recipe, check_compatible
from surogate_load.architecture import model_class, model_config, need_transformers, one_line
from surogate_load.device_choice import default_dtype, memory_errors, reachable
from surogate_load.errors import MismatchedModelError
from surogate_load.hub_download import repository_of
from surogate_load.load_keywords import Keywords, chosen_device, chosen_dtype, nearest, sort_keywords
from surogate_load.local import open_local, say_unused
from surogate_load.model_recipe import set_recipe
from surogate_load.reading.places import being_loaded
from surogate_load.recipes.device import check_device
from surogate_load.saved_adapter import INIT, check_saved, with_adapter
from surogate_load.step.regional import compile_layers


def load_model(
    artifact: str | Path,
    recipe: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    emulate: bool = False,
    *,
    compile: str | None = None,  # noqa: A002
    activation_memory: float | None = None,
    device_map: Any = None,
    torch_dtype: torch.dtype | str | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    **keywords: Any,
) -> Any:
    """Loads an artifact for training adapters on it, with `peft.get_peft_model` or otherwise.

    Afterwards `model.to(device)` moves everything, and `model.to(dtype)` casts what isn't quantized and the dtype of
    the products: packed tensors keep their bytes. (transformers itself refuses `.half()` and `.float()`.)

    PEFT keeps adapters of a bfloat16 model in float32, which an optimizer needs for small steps; their products with a
    packed layer are the model's dtype, as the recipes mean them, but for what PEFT multiplies itself (dropout, DoRA,
    several adapters at once). `get_peft_model(..., autocast_adapter_dtype=False)` keeps them in the model's dtype.

    Args:
        artifact: the directory that surogate-quantize, or `save_pretrained` of a packed model, wrote; or a checkpoint
            that others quantized: bitsandbytes NF4, compressed-tensors NVFP4 or FP8, FP8 in 128x128 tiles, ModelOpt
            NVFP4 or FP8. Scales of activations in it aren't used, and a warning names them. Or the name of either on
            the Hub, such as `me/model-nf4`: what a load needs of it is downloaded into the Hub's cache.
        recipe: `bf16`, `fp8-hybrid` or `nvfp4`; by default the one that the artifact records.
        device: where the model goes; by default the CPU. `meta` gives shapes alone, for `fully_shard` to fill.
        dtype: of what isn't quantized, and of the products; by default that of the source, but float16 for bfloat16 on
            GPUs that don't multiply that (below compute capability 8.0).
        emulate: compute fp8 and fp4 products in float32 from the same quantized operands, on any device.
        compile: `layers` compiles the decoder layers on their first call, adapters included.
        activation_memory: with it, what of the activations is saved for the backward, 0 to 1; see `compile_layers`.
        device_map: transformers' name for `device`, where it names one.
        torch_dtype: transformers' former name for `dtype`.
        adapter: `init` starts from the adapter that `surogate-quantize --adapter-init` wrote beside the weights: a
            `PeftModel`, trainable; PEFT's own defaults decide its dtype. A directory goes on with one that PEFT saved.
        revision: branch, tag or commit on the Hub.
        token: for the Hub; None takes HF_TOKEN or the stored login.
        keywords: fields of `surogate_formats.recipe.Recipe`, over those that the artifact records; or keywords of
            `from_pretrained` such as `attn_implementation`, and keys of config.json; see `load_keywords`.

    Returns:
        A transformers model in evaluation mode, all of its parameters frozen.

    Raises:
        UsageError: an unknown recipe or keyword, a value that `compile` or `activation_memory` can't have, or a format
            and a recipe that don't go together.
        NotPackedError: the name of a model on the Hub that isn't packed.
        SurogateError: it can't be had from the Hub; see `surogate_formats.hub_text`.
        DeviceUnavailableError: torch can't reach the device.
        DeviceMemoryError: the device has no room for the model.
        UnsupportedDeviceError: the device can't run the recipe, and `emulate` is off.
        UnknownArchitectureError: transformers can't make a model from config.json.
        PackedExpertsError, UnsupportedModuleError: a packed weight has no linear layer or experts to live in.
        ArtifactError, CheckpointError: the artifact is damaged, is not this model's, or is packed as we don't read.
        UnreadableAdapterError: `adapter` names none, or none of this model.
        MissingExtraError: transformers is not installed.
    """
    chosen_on = chosen_device(device, device_map)
    chosen_type = chosen_dtype(dtype, torch_dtype)
    if compile not in (None, "layers"):
        raise UsageError(f"load_model: compile={compile!r} is neither 'layers' nor None")
    if activation_memory is not None and not 0 <= activation_memory <= 1:
        raise UsageError(f"load_model: activation_memory={activation_memory} is not between 0 and 1")
    with open_local(artifact, revision, token) as opened:
        folder = opened.path / ADAPTER if adapter == INIT else adapter
        if folder is not None:
            check_saved(folder)
        if str(chosen_on) != "meta":  # else each rank looks at what it reads
            check_scales(opened)
        say_unused(opened)
        given = sort_keywords(keywords, opened.config.keys())
        chosen = choose_recipe(opened.recipe, recipe, given.switches)
        check_compatible(opened.format.name, chosen)
        reached = reachable(chosen_on)
        if not emulate:
            check_device(chosen, reached)
        with memory_errors(opened, reached):
            model = _read_model(opened, reached, chosen_type or default_dtype(opened, reached), given)
            model.requires_grad_(False)
            if reached.type == "meta":
                from surogate_load.parallel.stored_places import remember_places

                remember_places(model, opened)
            model.name_or_path = repository_of(opened.path) or model.name_or_path  # what adapters are saved with
            set_recipe(model, chosen, emulate=emulate)
    if compile is not None:
        compile_layers(model, activation_memory)
    return model if folder is None else with_adapter(model, folder, trainable=True)


def choose_recipe(recorded: Recipe, name: str | None, switches: dict[str, Any]) -> Recipe:
    """The recorded recipe with another name or switches; an unknown name is a `UsageError` with the nearest."""
    if name is not None and name not in RECIPES:
        raise UsageError(f"load_model: no recipe {name!r}; {nearest(name, RECIPES)}")
    lowered = {key: value.lower() if isinstance(value, str) else value for key, value in switches.items()}
    chosen: dict[str, Any] = lowered if name is None else {**lowered, "name": name}
    return replace(recorded, **chosen)


def _read_model(artifact: Artifact, device: torch.device, dtype: torch.dtype, keywords: Keywords) -> Any:
    need_transformers()
    # First, and by itself: our hook on it imports the plug-in, which must not be half imported then.
    importlib.import_module("transformers.quantizers.auto")
    from surogate_load.hf_quantizer import claim

    config = model_config(artifact, keywords.config)
    config.quantization_config = claim(artifact.quantization_config)
    loading = {**keywords.loading, **({} if device.type == "cpu" else {"device_map": {"": device}})}
    try:
        with being_loaded(artifact):
            model, report = model_class(artifact.config).from_pretrained(
                str(artifact.path),
                config=config,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                **loading,
            )
    except (ValueError, TypeError, ImportError) as error:
        if not keywords.loading:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in keywords.loading.items())
        raise UsageError(f"load_model: transformers refuses {given} ({one_line(error)})") from error
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
