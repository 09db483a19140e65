"""Layout `hf-fp8`: FP8 in 128x128 tiles, the layout of DeepSeek-V3 (transformers, vLLM, SGLang, Surogate)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from surogate_formats.format import Format, Shape
from surogate_formats.fp8 import FP8, TILE
from surogate_formats.layouts.layout import Config, expect, module_names


class HfFp8Layout:
    """`P.weight` and `P.weight_scale_inv`, which multiplies in spite of its name."""

    name: ClassVar[str] = "hf-fp8"
    suffixes: ClassVar[dict[str, dict[str, str]]] = {"fp8": {"codes": "weight", "scale": "weight_scale_inv"}}

    fixed: ClassVar[dict[str, dict[str, Any]]] = {}
    expert_warnings: ClassVar[dict[str, str]] = {}
    splits_experts: ClassVar[bool] = False
    dtype_warnings: ClassVar[dict[str, str]] = {}
    way_out: ClassVar[dict[str, str]] = {"fp8": "`scaling='channel'` takes every shape"}
    reader_warnings: ClassVar[dict[str, str]] = {}

    def refusal(self, fmt: Format) -> str | None:
        """Only tiles: vLLM doesn't know the other scalings under these names."""
        if not isinstance(fmt, FP8):
            return f"it doesn't store {fmt.name}"
        if fmt.scaling != "block":
            return f"vLLM can't read FP8 by {fmt.scaling} in hf-fp8: use `layout='compressed-tensors'`"
        if fmt.scale_dtype != "float32":
            return "hf-fp8 stores float32 scales"
        return None

    def keep_reason(self, fmt: Format, shape: Shape) -> str | None:
        """Readers derive the tile's size from shape // grid, which is silently wrong for clipped tiles."""
        ragged = [side for side in shape if side % TILE]
        return f"side {ragged[0]} is not a multiple of {TILE}, which hf-fp8's readers need" if ragged else None

    def quantization_config(self, fmt: Format, kept: Sequence[str]) -> Config:
        """`quant_method: fp8` with 128x128 tiles."""
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [TILE, TILE],
            "modules_to_not_convert": list(kept),
        }

    def parse_config(self, config: Config) -> tuple[Format, list[str]]:
        """Reads 128x128 tiles and, though they aren't written, scales by tensor; other tiles are refused by name.

        The dtype of the scales stands in the files alone.
        """
        block = expect({"weight_block_size": "missing", **config}, "weight_block_size", [TILE, TILE], None)
        return FP8("block" if block else "tensor"), module_names(config, "modules_to_not_convert")
