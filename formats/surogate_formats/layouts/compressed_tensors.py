"""Layout `compressed-tensors`: NVFP4, and FP8 by tensor or channel, weight only (transformers, vLLM, SGLang)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from surogate_formats.format import Format, Shape
from surogate_formats.fp8 import FP8, TILE
from surogate_formats.layouts.layout import Config, UnreadableConfigError, expect, module_names
from surogate_formats.nvfp4 import BLOCK, NVFP4

_NVFP4_WEIGHTS: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": BLOCK,
    "symmetric": True,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
}
_FP8_WEIGHTS: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


class CompressedTensorsLayout:
    """`P.weight_packed`, `P.weight_scale`, `P.weight_global_scale` (a divisor), or `P.weight` and `P.weight_scale`."""

    name: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[dict[str, dict[str, str]]] = {
        "fp4": {"codes": "weight_packed", "scale": "weight_scale", "global_scale": "weight_global_scale"},
        "fp8": {"codes": "weight", "scale": "weight_scale"},
    }

    fixed: ClassVar[dict[str, dict[str, Any]]] = {"fp8": {"scale_dtype": "bfloat16"}}
    expert_warnings: ClassVar[dict[str, str]] = {
        "fp4": "transformers 5.24 reads fp4 experts in layout compressed-tensors wrongly and without an error "
        "(huggingface/transformers#48371); surogate_load, vLLM and SGLang read them",
        "fp8": "vLLM can't load weight-only fp8 experts in layout compressed-tensors, surogate_load and transformers "
        "can; `scaling='block'` gives hf-fp8, which all of them read",
    }
    splits_experts: ClassVar[bool] = False
    dtype_warnings: ClassVar[dict[str, str]] = {
        "fp4": "plain transformers runs fp4 in bfloat16 alone, and fails at the first forward of other models",
        "fp8": "plain transformers rounds the scales to the model's dtype, which float16 holds less exactly",
    }
    way_out: ClassVar[dict[str, str]] = {}
    reader_warnings: ClassVar[dict[str, str]] = {}

    def refusal(self, fmt: Format) -> str | None:
        """FP8 tiles load in neither transformers' nor vLLM's weight-only path; scales must be exact in bfloat16."""
        if fmt.name not in self.suffixes:
            return f"it doesn't store {fmt.name}"
        if isinstance(fmt, FP8) and fmt.scaling == "block":
            return "vLLM fails on weight-only FP8 tiles in compressed-tensors: use `layout='hf-fp8'`"
        if isinstance(fmt, FP8) and fmt.scale_dtype != "bfloat16":
            return "transformers rounds these FP8 scales to the model's dtype: `scale_dtype` must be bfloat16"
        if isinstance(fmt, NVFP4) and fmt.step != "divide":
            return "compressed-tensors stores a global scale that divides: `step` must be divide"
        return None

    def keep_reason(self, fmt: Format, shape: Shape) -> str | None:
        """What the format takes, the readers take."""
        return None

    def quantization_config(self, fmt: Format, kept: Sequence[str]) -> Config:
        """One weight-only group for all linears, and what was kept by full name."""
        if isinstance(fmt, FP8):
            packing, weights = "float-quantized", {**_FP8_WEIGHTS, "strategy": fmt.scaling}
        else:
            packing, weights = "nvfp4-pack-quantized", _NVFP4_WEIGHTS
        group = {
            "targets": ["Linear"],
            "format": packing,
            "weights": dict(weights),
            "input_activations": None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": packing,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": list(kept),
            "config_groups": {"group_0": group},
        }

    def parse_config(self, config: Config) -> tuple[Format, list[str]]:
        """Reads one group of weights; how its activations are quantized is passed over.

        FP8 tiles are read, though not written, and the dtype of FP8 scales stands in the files alone.
        """
        expect(config, "quantization_status", "compressed", "frozen")
        groups = config.get("config_groups")
        group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
        if not isinstance(group, dict):
            raise UnreadableConfigError("quantization_config: config_groups must hold exactly one group")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise UnreadableConfigError("quantization_config: the group doesn't say what weights are")
        packing = expect(config, "format", "float-quantized", "naive-quantized", "nvfp4-pack-quantized")
        if group.get("format") not in (None, packing):
            raise UnreadableConfigError(f"quantization_config: the group's format isn't {packing}")
        if config.get("transform_config"):
            raise UnreadableConfigError(
                "quantization_config: transform_config rotates activations, which isn't done here"
            )
        expect(weights, "type", "float")
        expect(weights, "symmetric", True)
        kept = module_names(config, "ignore")
        if packing == "nvfp4-pack-quantized":
            expect(weights, "num_bits", 4)
            expect(weights, "group_size", BLOCK)
            expect(weights, "strategy", "tensor_group")
            return NVFP4(), kept
        expect(weights, "num_bits", 8)
        scaling = expect(weights, "strategy", "tensor", "channel", "block")
        if scaling == "block":
            expect(weights, "block_structure", [TILE, TILE])
        return FP8(scaling, "bfloat16"), kept
