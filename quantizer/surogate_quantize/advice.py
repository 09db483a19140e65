"""What a run can tell the user about the choice of format, from figures measured on the user's own weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.dtypes import NUMPY
from surogate_formats.errors import SurogateError
from surogate_formats.format import Format
from surogate_formats.layouts import LAYOUTS
from surogate_formats.nvfp4 import NVFP4
from surogate_formats.recipe import Recipe
from surogate_quantize.engine import Engine
from surogate_quantize.fused_experts import takes_apart
from surogate_quantize.options import Options
from surogate_quantize.plan import Plan, PlannedTensor
from surogate_quantize.source import Source

SAMPLE = 3
"""Weights that are quantized both ways to compare: the first, the middle and the last of the first source file."""


def _one_dimensional(fmt: NVFP4, recipe: Recipe) -> Format | None:
    """2-D scales buy a transpose that only recipe nvfp4 needs."""
    return replace(fmt, two_d=False) if fmt.two_d and recipe.name != "nvfp4" else None


ALTERNATIVES: dict[str, tuple[Callable[..., Format | None], str]] = {
    "fp4": (
        _one_dimensional,
        "with `two_d=False` the relative error is {other:.4f} instead of {own:.4f} (on {n} weights); recipe {recipe} "
        "does not need 2-D scales",
    ),
}
"""By format name: a format that the recipe may be better off with, and how to say so."""


def warnings_before(source: Checkpoint, made: Plan) -> list[str]:
    """What the user should know that follows from headers and options alone."""
    lines = []
    if source.unused:
        lines.append(f"not part of the checkpoint, left out: {', '.join(source.unused)}")
    options = made.options
    lines.extend(_experts(source, made))
    if always := options.layout.reader_warnings.get(options.format.name):
        lines.append(always)
    dtypes = {tensor.info.dtype for tensor in made.quantized}
    warning = options.layout.dtype_warnings.get(options.format.name)
    if warning and dtypes != {"BF16"}:
        lines.append(f"the source is {', '.join(sorted(dtypes))}: {warning}")
    lines.extend(_layers_missing(source))
    if "auto_map" in source.config:
        lines.append("config.json names code of the model's own (auto_map); code is not carried over")
    return lines


def _experts(source: Checkpoint, made: Plan) -> list[str]:
    """What readers get wrong about packed experts, or what would pack those that are kept."""
    layout, fmt = made.options.layout, made.options.format
    if not any(".experts." in tensor.info.name for tensor in made.quantized):
        others = [name for name, each in LAYOUTS.items() if each.splits_experts and fmt.name in each.suffixes]
        kept = source.fused_experts.keys() - takes_apart(source, layout).keys()
        return [f"all experts are kept; `layout={others[0]!r}` packs them, for surogate_load alone"] if kept else []
    if any(not parts[0].arrangement.apart for parts in source.fused_experts.values()):
        return ["surogate_load alone loads these experts packed: vLLM and plain transformers know them fused only, and "
                "vLLM leaves them at random without an error; `skip='experts'` keeps them as they are"]  # fmt: skip
    danger = layout.expert_warnings.get(fmt.name)
    return [danger] if danger else []


def starved_experts(tokens: Mapping[str, int]) -> list[str]:
    """What is to be said of experts, by name, that were given so few tokens of the text that others had to help out."""
    if not tokens:
        return []
    fewest = min(tokens, key=lambda name: tokens[name])
    experts = f"{len(tokens)} experts were" if len(tokens) > 1 else "1 expert was"
    return [
        f"{experts} given fewer tokens of the calibration text than their weights have columns (the fewest, "
        f"{tokens[fewest]}, {fewest}); the mean of all tokens stands in for the rest: more `calibration_tokens` help"
    ]


def _layers_missing(source: Checkpoint) -> list[str]:
    """What config.json says of the model's depth, if the tensors say less."""
    found = {int(match[1]) for name in source.tensors if (match := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name))}
    claimed = source.config.get("num_hidden_layers")
    if not found or claimed is None or (type(claimed) is int and claimed <= max(found) + 1):
        return []
    return [
        f"config.json says num_hidden_layers {str(claimed)[:20]!r}, and the tensors are of {max(found) + 1}: no model "
        "may be loaded from the artifact; see whether the source is whole"
    ]


class Comparison:
    """Compares the chosen format with its alternative on a sample of the weights."""

    def __init__(self, engine: Engine, options: Options) -> None:
        """Takes the alternative from `ALTERNATIVES`."""
        self._engine = engine
        self._options = options

    def advice(self, source: Checkpoint, tensors: Sequence[PlannedTensor], limit: int) -> list[str]:
        """A line for the summary if the alternative's measured error is smaller; else none.

        Args:
            source: the open checkpoint.
            tensors: those that will be worked on.
            limit: bytes of the largest weight that is looked at.
        """
        if self._options.format.name not in ALTERNATIVES:
            return []
        alternative, words = ALTERNATIVES[self._options.format.name]
        other_format = alternative(self._options.format, self._options.recipe)
        if other_format is None:
            return []
        quantized = [tensor for tensor in tensors if tensor.decision.quantize]
        # A file that is first needed later may still have to come from the Hub.
        first = source.entry(quantized[0].info.name).file if quantized else ""
        here = [tensor for tensor in quantized if source.entry(tensor.info.name).file == first]
        weights = [tensor for tensor in here if tensor.info.nbytes <= limit]
        if not weights:
            return []
        sample = sorted({0, len(weights) // 2, len(weights) - 1})[:SAMPLE]
        try:
            own = self._error(source, [weights[i] for i in sample], self._options.format)
            other = self._error(source, [weights[i] for i in sample], other_format)
        except SurogateError:  # the alternative can't take these weights
            return []
        if other >= own:
            return []
        return [words.format(own=own, other=other, n=len(sample), recipe=self._options.recipe.name)]

    def _error(self, source: Checkpoint, weights: list[PlannedTensor], fmt: Format) -> float:
        error = square = 0.0
        for tensor in weights:
            array = np.empty(tensor.info.shape, NUMPY[tensor.info.dtype])
            source.read_into(tensor.info.name, array.reshape(-1).view(np.uint8).data)
            weight = Source.of(array, tensor.info.dtype)
            _, errors = self._engine.quantize(fmt, weight, self._engine.amax(weight))
            error, square = error + errors.squared_error, square + errors.squared_sum
            del array, weight
        return float((error / square) ** 0.5) if square else 0.0
