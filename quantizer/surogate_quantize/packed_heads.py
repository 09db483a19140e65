"""`--quantize-lm-head`: the one linear outside every block, where a layout's readers take it packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

from surogate_formats.errors import UsageError
from surogate_formats.format import Format
from surogate_formats.layouts import Layout
from surogate_formats.layouts.compressed_tensors import CompressedTensorsLayout
from surogate_quantize import layer_rules as rules
from surogate_quantize.keep_rules import Tensors
from surogate_quantize.selection import Decision
from surogate_quantize.skip_options import SkipOptions, compile_pattern

REASON: Final = "lm_head, as asked"

_LM_HEAD: Final = "lm_head"

_REFUSALS: Final = {
    "hf-fp8": "vLLM and SGLang take the head for an unquantized one; `scaling` tensor and channel have layout "
    "compressed-tensors, which takes it",
    "bitsandbytes": "vLLM and SGLang take the head for an unquantized one; `layout='surogate'` takes it",
}
"""Layout to why its readers don't take a packed head."""


class HeadNamingLayout(CompressedTensorsLayout):
    """Layout compressed-tensors with a packed head: vLLM and SGLang find it by its name alone, not as a `Linear`."""

    reader_warnings: ClassVar[dict[str, str]] = dict.fromkeys(
        CompressedTensorsLayout.suffixes,
        "the head is packed, too: vLLM reads that since 2026-03 (#37291), SGLang since 2026-08 (#35228; before that "
        "wrongly, without an error)",
    )

    def __init__(self, head: str) -> None:
        """For a head's full module name."""
        self._head = head

    def quantization_config(self, fmt: Format, kept: Sequence[str]) -> dict[str, Any]:
        """The layout's own, with the head among the targets."""
        config = super().quantization_config(fmt, kept)
        for group in config["config_groups"].values():
            group["targets"] = [*group["targets"], self._head]
        return config


class PackedHeadError(UsageError):
    """`quantize_lm_head` asks for what the layout's readers, the model or another option don't allow."""


def check_layout(layout: Layout) -> None:
    """Raises `PackedHeadError` for a layout whose readers don't take a packed head."""
    if layout.name in _REFUSALS:
        raise PackedHeadError(f"`quantize_lm_head=True` with layout {layout.name}: {_REFUSALS[layout.name]}")


def with_head(
    decisions: Mapping[str, Decision],
    tensors: Tensors,
    config: Mapping[str, Any],
    skip: SkipOptions,
    refuses: Callable[[tuple[int, ...]], str | None],
) -> dict[str, Decision]:
    """The decisions with the output head's turned into one to quantize.

    Args:
        decisions: about every tensor.
        tensors: safetensors dtype and shape of each.
        config: `config.json`.
        skip: the user's exceptions, which must not name the head.
        refuses: why the format or the layout can't take a weight of a shape.

    Raises:
        PackedHeadError: there is no head of its own, it may be tied to the embedding, or it can't take the format.
    """
    heads = [name for name, decision in decisions.items() if decision.reason == _LM_HEAD and _is_head(name)]
    _check_untied(config, heads)
    if len(heads) > 1:
        raise PackedHeadError(f"`quantize_lm_head=True`: the model has several heads ({', '.join(heads)})")
    head = heads[0]
    shape = tensors[head][1]
    named = next((pattern for pattern in skip.patterns if compile_pattern(pattern)(head)), None)
    reason = f"matches `skip` {named}" if named else f"{len(shape)}-D" if len(shape) != 2 else refuses(shape)
    if reason:
        raise PackedHeadError(f"`quantize_lm_head=True`: {head} can't be quantized ({reason})")
    return {**decisions, head: Decision(True, REASON)}


def naming_head(layout: Layout, decisions: Mapping[str, Decision]) -> Layout:
    """The layout that declares the head packed that `with_head` decided on."""
    head = next(name for name, decision in decisions.items() if decision.reason == REASON)
    return HeadNamingLayout(head.removesuffix(".weight")) if layout.name == HeadNamingLayout.name else layout


def _is_head(name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and rules.HEADS.reason([module.rpartition(".")[2]]) == _LM_HEAD


def _check_untied(config: Mapping[str, Any], heads: list[str]) -> None:
    text = config.get("text_config")
    places = [config, text] if isinstance(text, Mapping) else [config]
    said = [place["tie_word_embeddings"] for place in places if "tie_word_embeddings" in place]
    if any(said) or not heads:
        raise PackedHeadError(
            "`quantize_lm_head=True`: the model has no head of its own but the embedding (tied), which stays as it is"
        )
    if not said:
        raise PackedHeadError(
            "`quantize_lm_head=True`: config.json has no tie_word_embeddings, so readers may put the embedding in the "
            f"place of {heads[0]}; write false there if that is a weight of its own"
        )
