"""What a run is asked to do: everything that can change a byte of the artifact, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from surogate_formats.codes_in_words import Codes
from surogate_formats.errors import UsageError
from surogate_formats.format import Format
from surogate_formats.layouts import FOR_EXPERTS, LAYOUTS, Layout, settle
from surogate_formats.recipe import Recipe, check_compatible
from surogate_formats.registry import make_format
from surogate_formats.training_config import Lora, TrainingConfig
from surogate_quantize.calibration_options import CalibrationOptions, settle_calibration
from surogate_quantize.packed_heads import check_layout
from surogate_quantize.skip_options import SkipOptions

DEFAULT_MAX_SHARD_SIZE = 5 * 1000**3
"""Bytes; the shard size of transformers and the Hub."""

_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class BadSizeError(UsageError):
    """A size that can't be read, or is not positive."""


class NoFormatError(UsageError):
    """Neither the argument nor the training file names a format."""


@dataclass(frozen=True)
class Options:
    """A settled request.

    Attributes:
        format: the format with its parameters.
        layout: where its parts go.
        skip: what stays unquantized on the user's word.
        recipe, lora: kept in the artifact as defaults for training.
        max_shard_size: bytes of payload that a shard may hold; a single weight may exceed it.
        layout_asked: whether the layout was asked for, and isn't just the format's default.
        quantize_lm_head: whether the output head is quantized, too.
        codes: how codes and scales are chosen.
        calibration: what calibrated codes are chosen on.
        adapter_init: rank of an adapter that starts from what is left of the error; None makes none.
    """

    format: Format
    layout: Layout
    skip: SkipOptions = field(default_factory=SkipOptions)
    recipe: Recipe = field(default_factory=Recipe)
    lora: Lora = field(default_factory=Lora)
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE
    layout_asked: bool = True
    quantize_lm_head: bool = False
    codes: Codes = "nearest"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    adapter_init: int | None = None

    @property
    def calibrates(self) -> bool:
        """Whether the model is run on text."""
        return self.codes == "calibrated" or self.adapter_init is not None

    def for_experts(self) -> Options:
        """The same where experts are quantized: another layout may be the format's default there."""
        name = self.format.name
        if self.layout_asked or name not in FOR_EXPERTS:
            return self
        layout = LAYOUTS[FOR_EXPERTS[name]]
        fmt = make_format(name, {**vars(self.format), **layout.fixed.get(name, {})})
        return self if layout.refusal(fmt) else replace(self, format=fmt, layout=layout)

    def recorded(self) -> dict[str, Any]:
        """What the manifest records beside format, layout, recipe and adapter; JSON-ready."""
        return {
            "skip_first_layers": self.skip.first_layers,
            "skip_last_layers": self.skip.last_layers,
            "skip": list(self.skip.patterns),
            "max_shard_size": self.max_shard_size,
            "quantize_lm_head": self.quantize_lm_head,
            "codes": self.codes,
            "adapter_init": self.adapter_init,
        }


def make_options(
    format_name: str | None,
    parameters: Mapping[str, Any],
    layout: str | None = None,
    *,
    training: TrainingConfig | None = None,
    skip_first_layers: int | None = None,
    skip_last_layers: int | None = None,
    skip: tuple[str, ...] = (),
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    quantize_lm_head: bool = False,
    codes: Codes = "nearest",
    calibration_text: str | None = None,
    calibration_tokens: int | None = None,
    adapter_init: int | None = None,
    adapter_joint: bool = False,
) -> Options:
    """Settles arguments and a training file into options; an argument that is given wins over the file.

    Args:
        format_name: `nf4`, `fp4` or `fp8`; None takes the training file's.
        parameters: the format's parameters that are given; None is as good as not given, but wins over the file.
        layout: a layout's name; None takes the format's default.
        training: the training file, if there is one.
        skip_first_layers: decoder blocks kept at the start; None takes the training file's.
        skip_last_layers: the same at the end.
        skip: patterns, added to the defaults.
        max_shard_size: bytes, or a text such as `5GB`.
        quantize_lm_head: quantize the output head, too, unless it is tied to the embedding.
        codes: `nearest`, the values nearest to the weights; `search`, scales with the least squared error;
            `calibrated`, what keeps the model's output on text.
        calibration_text: a file to calibrate on; None: the model writes the text.
        calibration_tokens: how many tokens of it; None: by the widest weight.
        adapter_init: rank of a LoRA adapter that starts from what is left of the error, found on the same text.
        adapter_joint: choose calibrated codes and the adapter together: better with it, worse without.

    Raises:
        UsageError: no format, or a parameter, layout or recipe that doesn't go with the format.
        CalibrationOptionsError: options of calibration without calibrated codes.
        PackedHeadError: the layout's readers don't take a packed head.
    """
    training = training or TrainingConfig()
    name = format_name or training.format_name
    if name is None:
        raise NoFormatError("no format: give `format_name` nf4, fp4 or fp8, or a `training` file that turns one on")
    fmt, chosen = settle(name, {**training.by_format.get(name, {}), **parameters}, layout)
    check_compatible(name, training.recipe)
    if quantize_lm_head:
        check_layout(chosen)
    first = training.skip_first_layers if skip_first_layers is None else skip_first_layers
    last = training.skip_last_layers if skip_last_layers is None else skip_last_layers
    return Options(
        format=fmt,
        layout=chosen,
        skip=SkipOptions(first, last, tuple(skip)),
        recipe=training.recipe,
        lora=training.lora,
        max_shard_size=parse_size(max_shard_size, "max_shard_size"),
        layout_asked=layout is not None,
        quantize_lm_head=quantize_lm_head,
        codes=codes,
        calibration=settle_calibration(codes, calibration_text, calibration_tokens, adapter_init, adapter_joint),
        adapter_init=adapter_init,
    )


def parse_size(size: int | str, name: str) -> int:
    """Bytes from a number or a text such as `500MB` (decimal) or `2GiB` (binary); `name` is the option's.

    Raises:
        BadSizeError: not such a text, or not positive.
    """
    text = str(size).strip()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(digits) :].strip().upper()
    try:
        number = round(float(digits) * _SIZE_UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise BadSizeError(f"`{name}` {text!r}: write a number and a unit, such as 5GB or 500MiB") from None
    if number <= 0:
        raise BadSizeError(f"`{name}` {text!r}: must be positive")
    return number
