"""The specification's YAML: keys of a training file that say how the base is quantized and trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surogate_formats.checkpoint.errors import shown
from surogate_formats.errors import UsageError
from surogate_formats.foreign_keys import UnknownKeyError, check_foreign, without_effect
from surogate_formats.recipe import Recipe
from surogate_formats.registry import FORMATS, make_format
from surogate_formats.strict_yaml import LARGEST_FILE, TrainingConfigError, read_mapping
from surogate_formats.yaml_values import (
    ALL_LINEAR,
    adapter_dtype,
    boolean,
    count,
    fraction,
    module_names,
    one_of,
    text,
)

__all__ = [
    "ALL_LINEAR",
    "KEYS",
    "LARGEST_FILE",
    "Lora",
    "TrainingConfig",
    "TrainingConfigError",
    "TwoFormatsError",
    "UnknownKeyError",
    "load_training_config",
    "parameter_keys",
]


class TwoFormatsError(TrainingConfigError):
    """More than one of qlora_fp8, qlora_fp4 and qlora_bnb is on."""


@dataclass(frozen=True)
class Lora:
    """The adapter that the training file asks for.

    Attributes:
        enabled: whether there is one.
        rank, alpha: its inner dimension, and alpha/rank times its product is added.
        dropout: of its input, while training.
        dtype: `float32` or `bfloat16`; None leaves the choice to PEFT (float32).
        target_modules: `all-linear`, or names (or ends of names) of modules.
    """

    enabled: bool = False
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    dtype: str | None = None
    target_modules: str | tuple[str, ...] = ALL_LINEAR


@dataclass(frozen=True)
class TrainingConfig:
    """What a training file says, in our terms.

    Attributes:
        model: the source model, if named.
        format_name: `fp8`, `fp4` or `nf4`; None if no format is on.
        by_format: format name to its parameters that the file sets, also where it turns no format on.
        recipe: the arithmetic of a step, with its switches.
        lora: the adapter.
        skip_first_layers, skip_last_layers: decoder blocks that stay as they are.
        ignored: keys that are not ours, in the file's order.
        without_effect: those of them that would mean something for what is loaded, and why they don't here.
    """

    model: str | None = None
    format_name: str | None = None
    by_format: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    lora: Lora = field(default_factory=Lora)
    skip_first_layers: int = 0
    skip_last_layers: int = 0
    ignored: tuple[str, ...] = ()
    without_effect: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters of the format that is on; none if none is."""
        return self.by_format.get(self.format_name or "", {})


@dataclass(frozen=True)
class _Key:
    """Where a key's value goes: `target` is a field of `TrainingConfig` or `Recipe`, or `<format>.<parameter>`."""

    parse: Callable[[Any], Any]
    targets: tuple[str, ...]
    negate: bool = False


_METRIC = _Key(one_of("mse", "l1", "absmax"), ("recipe.four_over_six_metric", "fp4.metric"))
_BACKEND = _Key(one_of("cutlass", "cudnn"), ("recipe.backend",))
_HISTORY = _Key(count, ("recipe.amax_history_len",))

KEYS: dict[str, _Key] = {
    "model": _Key(text, ("model",)),
    "recipe": _Key(one_of("bf16", "fp8-hybrid", "nvfp4"), ("recipe.name",)),
    "lora": _Key(boolean, ("lora.enabled",)),
    "lora_rank": _Key(count, ("lora.rank",)),
    "lora_alpha": _Key(count, ("lora.alpha",)),
    "lora_dropout": _Key(fraction, ("lora.dropout",)),
    "lora_dtype": _Key(adapter_dtype, ("lora.dtype",)),
    "lora_target_modules": _Key(module_names, ("lora.target_modules",)),
    "skip_quant_first_layers": _Key(count, ("skip_first_layers",)),
    "skip_quant_last_layers": _Key(count, ("skip_last_layers",)),
    "qlora_fp8": _Key(boolean, ("format.fp8",)),
    "qlora_fp4": _Key(boolean, ("format.fp4",)),
    "qlora_bnb": _Key(boolean, ("format.nf4",)),
    "margin": _Key(count, ("recipe.margin",)),
    "amax_history_len": _HISTORY,
    "fp8_amax_history": _HISTORY,
    "amax_compute_algo": _Key(one_of("max", "most_recent"), ("recipe.amax_compute_algo",)),
    "reduce_amax": _Key(boolean, ("recipe.reduce_amax",)),
    "disable_rht": _Key(boolean, ("recipe.disable_rht",)),
    "disable_stochastic_rounding": _Key(boolean, ("recipe.disable_stochastic_rounding",)),
    "disable_2d_quantization": _Key(boolean, ("recipe.disable_2d_quantization", "fp4.two_d"), negate=True),
    "backend": _BACKEND,
    "fp4_backend": _BACKEND,
    "enable_four_over_six": _Key(boolean, ("recipe.four_over_six", "fp4.four_over_six")),
    "four_over_six_metric": _METRIC,
    "qlora_bnb_block_size": _Key(count, ("nf4.block_size",)),
    "qlora_bnb_double_quant": _Key(boolean, ("nf4.double_quant",)),
}
"""Every key of the specification, Surogate's spellings of two of them, and its other keys of the adapter."""


def load_training_config(path: str | Path, *, strict: bool = False, format_name: str | None = None) -> TrainingConfig:
    """Reads a training file.

    Args:
        path: the YAML file.
        strict: refuse every key that is not ours.
        format_name: the format that was chosen elsewhere, which settles what a file with two leaves open.

    Raises:
        TrainingConfigError: the file can't be read, is no mapping, or gives a key a value that it can't have.
        UnknownKeyError: a misspelled key; the message suggests the nearest one.
        TwoFormatsError: two formats at once.
    """
    data = read_mapping(Path(path))
    ignored = [key for key in data if key not in KEYS]
    for key in ignored:
        check_foreign(Path(path), key, data[key], KEYS, strict)
    values: dict[str, dict[str, Any]] = {}
    for key, value in data.items():
        if key in KEYS and value is not None:
            _assign(values, Path(path), key, value)
    built = _build(Path(path), values, format_name)
    return replace(built, ignored=tuple(map(str, ignored)), without_effect=without_effect(data, KEYS))


def _assign(values: dict[str, dict[str, Any]], path: Path, key: str, value: Any) -> None:
    entry = KEYS[key]
    try:
        parsed = entry.parse(value)
    except ValueError as error:
        raise TrainingConfigError(f"{shown(path)}: {key} is {value!r:.80}; expected {error}") from error
    for target in entry.targets:
        section, _, name = target.rpartition(".")
        inverted = entry.negate and section == "fp4"
        place = values.setdefault(section, {})
        if name in place and place[name] != (not parsed if inverted else parsed):
            raise TrainingConfigError(f"{shown(path)}: {key} contradicts another spelling of the same key")
        place[name] = not parsed if inverted else parsed


def _build(path: Path, values: dict[str, dict[str, Any]], chosen: str | None) -> TrainingConfig:
    formats = [name for name, on in values.get("format", {}).items() if on]
    if len(formats) > 1 and chosen is None:
        raise TwoFormatsError(f"{shown(path)}: {' and '.join(formats)} are both on; leave one")
    by_format = {name: values[name] for name in FORMATS if name in values}
    nf4 = by_format.get("nf4", {})
    if "double_quant" in nf4:
        nf4["double_quant"] = None if nf4["double_quant"] else "none"  # on: the kind that the layout stores
    lora = Lora(**values.get("lora", {}))
    if lora.rank < 1:
        raise TrainingConfigError(f"{shown(path)}: lora_rank is {lora.rank}; it must be at least 1")
    try:
        recipe = Recipe(**values.get("recipe", {}))
        for name, parameters in by_format.items():
            make_format(name, {key: value for key, value in parameters.items() if value is not None})
    except UsageError as error:
        raise TrainingConfigError(f"{shown(path)}: {error}") from error
    return TrainingConfig(
        format_name=chosen if chosen in formats else formats[0] if formats else None,
        by_format=by_format,
        recipe=recipe,
        lora=lora,
        **values.get("", {}),
    )


def parameter_keys(format_name: str) -> dict[str, str]:
    """The parameters of a format that a training file can set, each with its key."""
    return {
        target.partition(".")[2]: key
        for key, entry in KEYS.items()
        for target in entry.targets
        if target.partition(".")[0] == format_name
    }
