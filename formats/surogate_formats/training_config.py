"""The specification's YAML: keys of a training file that say how the base is quantized and trained on."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from surogate_formats.errors import UsageError
from surogate_formats.recipe import Recipe
from surogate_formats.registry import FORMATS

LARGEST_FILE = 1 << 20
"""Bytes; a training file is a page of text."""


class TrainingConfigError(UsageError):
    """A training file that can't be read, or a key of ours with a value that it can't have."""


class UnknownKeyError(TrainingConfigError):
    """A key that looks like one of ours and is none."""


class TwoFormatsError(TrainingConfigError):
    """More than one of qlora_fp8, qlora_fp4 and qlora_bnb is on."""


@dataclass(frozen=True)
class Lora:
    """The adapter that the training file asks for."""

    enabled: bool = False
    rank: int = 16
    alpha: int = 32


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
    """

    model: str | None = None
    format_name: str | None = None
    by_format: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    lora: Lora = field(default_factory=Lora)
    skip_first_layers: int = 0
    skip_last_layers: int = 0
    ignored: tuple[str, ...] = ()

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters of the format that is on; none if none is."""
        return self.by_format.get(self.format_name or "", {})


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a whole number, not negative")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def _one_of(*names: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        spelled = value.lower().replace("_", "-") if isinstance(value, str) else value
        for name in names:
            if spelled == name.replace("_", "-"):
                return name
        raise ValueError(f"one of {', '.join(names)}")

    return parse


@dataclass(frozen=True)
class _Key:
    """Where a key's value goes: `target` is a field of `TrainingConfig` or `Recipe`, or `<format>.<parameter>`."""

    parse: Callable[[Any], Any]
    targets: tuple[str, ...]
    negate: bool = False


_METRIC = _Key(_one_of("mse", "l1", "absmax"), ("recipe.four_over_six_metric", "fp4.metric"))
_BACKEND = _Key(_one_of("cutlass", "cudnn"), ("recipe.backend",))
_HISTORY = _Key(_count, ("recipe.amax_history_len",))

KEYS: dict[str, _Key] = {
    "model": _Key(_text, ("model",)),
    "recipe": _Key(_one_of("bf16", "fp8-hybrid", "nvfp4"), ("recipe.name",)),
    "lora": _Key(_boolean, ("lora.enabled",)),
    "lora_rank": _Key(_count, ("lora.rank",)),
    "lora_alpha": _Key(_count, ("lora.alpha",)),
    "skip_quant_first_layers": _Key(_count, ("skip_first_layers",)),
    "skip_quant_last_layers": _Key(_count, ("skip_last_layers",)),
    "qlora_fp8": _Key(_boolean, ("format.fp8",)),
    "qlora_fp4": _Key(_boolean, ("format.fp4",)),
    "qlora_bnb": _Key(_boolean, ("format.nf4",)),
    "margin": _Key(_count, ("recipe.margin",)),
    "amax_history_len": _HISTORY,
    "fp8_amax_history": _HISTORY,
    "amax_compute_algo": _Key(_one_of("max", "most_recent"), ("recipe.amax_compute_algo",)),
    "reduce_amax": _Key(_boolean, ("recipe.reduce_amax",)),
    "disable_rht": _Key(_boolean, ("recipe.disable_rht",)),
    "disable_stochastic_rounding": _Key(_boolean, ("recipe.disable_stochastic_rounding",)),
    "disable_2d_quantization": _Key(_boolean, ("recipe.disable_2d_quantization", "fp4.two_d"), negate=True),
    "backend": _BACKEND,
    "fp4_backend": _BACKEND,
    "enable_four_over_six": _Key(_boolean, ("recipe.four_over_six", "fp4.four_over_six")),
    "four_over_six_metric": _METRIC,
    "qlora_bnb_block_size": _Key(_count, ("nf4.block_size",)),
    "qlora_bnb_double_quant": _Key(_boolean, ("nf4.double_quant",)),
}
"""Every key of the specification, and Surogate's spellings of two of them."""

_OURS = ("qlora_", "fp8_", "fp4_", "skip_quant_", "amax_")
"""A key that starts so and is not in `KEYS` would change what is quantized: it is never passed over."""

_LOOKALIKES = frozenset({"local_rank", "mode"})
"""Keys of real trainers that are as near to one of ours as a misspelling."""


class _StrictLoader(yaml.SafeLoader):
    """Plain data only: no anchors (a page of them can expand to gigabytes) and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice")
        return super().construct_mapping(node, deep=deep)


def load_training_config(path: str | Path, *, strict: bool = False) -> TrainingConfig:
    """Reads a training file.

    Args:
        path: the YAML file.
        strict: refuse every key that is not ours.

    Raises:
        TrainingConfigError: the file can't be read, is no mapping, or gives a key a value that it can't have.
        UnknownKeyError: a misspelled key; the message suggests the nearest one.
        TwoFormatsError: two formats at once.
    """
    data = _read(Path(path))
    ignored = [key for key in data if key not in KEYS]
    for key in ignored:
        _check_foreign(Path(path), key, strict)
    values: dict[str, dict[str, Any]] = {}
    for key, value in data.items():
        if key in KEYS and value is not None:
            _assign(values, Path(path), key, value)
    return _build(Path(path), values, tuple(map(str, ignored)))


def _read(path: Path) -> dict[Any, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise TrainingConfigError(f"{path}: larger than {LARGEST_FILE} bytes; this is no training file")
        data = yaml.load(path.read_text("utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise TrainingConfigError(f"{path}: can't be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise TrainingConfigError(f"{path}: no YAML that we read ({reason})") from error
    if not isinstance(data, dict):
        raise TrainingConfigError(f"{path}: not a mapping of keys to values")
    return data


def _check_foreign(path: Path, key: Any, strict: bool) -> None:
    name = str(key)
    near = difflib.get_close_matches(name.lower(), KEYS, n=1, cutoff=0.84) if name not in _LOOKALIKES else []
    if not near and name.startswith(_OURS):
        near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0)
    if near:
        raise UnknownKeyError(f"{path}: unknown key {name!r}; did you mean {near[0]!r}?")
    if strict:
        raise UnknownKeyError(f"{path}: {name!r} is not a key of ours; leave out --strict to pass over such keys")


def _assign(values: dict[str, dict[str, Any]], path: Path, key: str, value: Any) -> None:
    entry = KEYS[key]
    try:
        parsed = entry.parse(value)
    except ValueError as error:
        raise TrainingConfigError(f"{path}: {key} is {value!r}; expected {error}") from error
    for target in entry.targets:
        section, _, name = target.rpartition(".")
        inverted = entry.negate and section == "fp4"
        place = values.setdefault(section, {})
        if name in place and place[name] != (not parsed if inverted else parsed):
            raise TrainingConfigError(f"{path}: {key} contradicts another spelling of the same key")
        place[name] = not parsed if inverted else parsed


def _build(path: Path, values: dict[str, dict[str, Any]], ignored: tuple[str, ...]) -> TrainingConfig:
    formats = [name for name, on in values.get("format", {}).items() if on]
    if len(formats) > 1:
        raise TwoFormatsError(f"{path}: {' and '.join(formats)} are both on; leave one")
    by_format = {name: values[name] for name in FORMATS if name in values}
    nf4 = by_format.get("nf4", {})
    if "double_quant" in nf4:
        nf4["double_quant"] = "affine" if nf4["double_quant"] else "none"
    lora = Lora(**values.get("lora", {}))
    if lora.rank < 1:
        raise TrainingConfigError(f"{path}: lora_rank is {lora.rank}; it must be at least 1")
    return TrainingConfig(
        format_name=formats[0] if formats else None,
        by_format=by_format,
        recipe=Recipe(**values.get("recipe", {})),
        lora=lora,
        ignored=ignored,
        **values.get("", {}),
    )
