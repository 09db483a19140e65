"""Layout `modelopt`: NVFP4, and FP8 with one scale a tensor, as NVIDIA's ModelOpt exports them.

The readers' demands, as read in their sources and, for vLLM, run (surogate_load.readers says by whom):

- NVFP4 is declared as `NVFP4` without `input_activations`, and holds no `input_scale`: vLLM then multiplies by weights
  alone, and Surogate takes this `quant_algo` only.
- FP8 has no such weight-only variant. Its readers quantize activations with a stored `input_scale`, and without one
  vLLM computes with the smallest float32. A checkpoint that nobody calibrated gets 1: activations are rounded to E4M3
  as they stand, saturating at 448.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from surogate_formats.format import Format, Parts, Shape, TensorSpec
from surogate_formats.fp8 import FP8
from surogate_formats.layouts.layout import Config, UnreadableConfigError, expect, module_names
from surogate_formats.nvfp4 import BLOCK, NVFP4
from surogate_formats.version import VERSION

SIDECAR = "hf_quant_config.json"
"""What TensorRT-LLM reads, and others where config.json declares nothing."""

_ALGORITHMS: dict[str, Format] = {
    "NVFP4": NVFP4(step="multiply"),
    "W4A16_NVFP4": NVFP4(step="multiply"),
    "FP8": FP8("tensor"),
}
"""`quant_algo` to the format of the weights."""


class ModelOptLayout:
    """`P.weight`, `P.weight_scale` and `P.weight_scale_2`, which multiplies, or `P.weight`, `P.weight_scale`.

    What there is one of is stored as a scalar, of shape [].
    """

    name: ClassVar[str] = "modelopt"
    suffixes: ClassVar[dict[str, dict[str, str]]] = {
        "fp4": {"codes": "weight", "scale": "weight_scale", "global_scale": "weight_scale_2"},
        "fp8": {"codes": "weight", "scale": "weight_scale", "input_scale": "input_scale"},
    }

    fixed: ClassVar[dict[str, dict[str, Any]]] = {"fp4": {"step": "multiply"}}
    expert_warnings: ClassVar[dict[str, str]] = {
        "fp4": "plain transformers can't load fp4 experts in layout modelopt, surogate_load can; vLLM, TensorRT-LLM "
        "and Surogate should (not run)",
        "fp8": "plain transformers can't load fp8 experts in layout modelopt, surogate_load can; vLLM and TensorRT-LLM "
        "should (not run)",
    }
    splits_experts: ClassVar[bool] = True
    dtype_warnings: ClassVar[dict[str, str]] = {}
    way_out: ClassVar[dict[str, str]] = {}
    reader_warnings: ClassVar[dict[str, str]] = {
        "fp8": "plain transformers reads fp8 in layout modelopt wrongly and without an error (with surogate_load "
        "imported, rightly); vLLM and TensorRT-LLM round activations to E4M3 with scale 1, which nobody calibrated"
    }

    def refusal(self, fmt: Format) -> str | None:
        """The global scale must be exact both ways; FP8 has one scale a tensor, in float32."""
        if fmt.name not in self.suffixes:
            return f"it doesn't store {fmt.name}"
        if isinstance(fmt, NVFP4) and fmt.step != "multiply":
            return "modelopt stores a global scale that multiplies: `step` must be multiply"
        if isinstance(fmt, NVFP4) and fmt.global_scale != "pow2":
            return "the reciprocal of an `amax` global scale is rounded: `global_scale` must be pow2"
        if isinstance(fmt, FP8) and fmt.scaling != "tensor":
            other = "hf-fp8" if fmt.scaling == "block" else "compressed-tensors"
            return f"ModelOpt's FP8 has one scale a tensor, not one a {fmt.scaling}: use `layout='{other}'`"
        if isinstance(fmt, FP8) and fmt.scale_dtype != "float32":
            return "modelopt stores float32 scales"
        return None

    def keep_reason(self, fmt: Format, shape: Shape) -> str | None:
        """What the format takes, the readers take."""
        return None

    def quantization_config(self, fmt: Format, kept: Sequence[str]) -> Config:
        """One group over all linears, and what was kept by full name."""
        bits: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
        if isinstance(fmt, FP8):
            algorithm, group = "FP8", {"input_activations": bits, "weights": dict(bits)}
        else:
            algorithm, group = "NVFP4", {"weights": {**bits, "num_bits": 4, "group_size": BLOCK}}
        return {
            "quant_method": "modelopt",
            "quant_algo": algorithm,
            "config_groups": {"group_0": {**group, "targets": ["Linear"]}},
            "ignore": list(kept),
            "producer": {"name": "surogate-quant", "version": VERSION},
        }

    def sidecars(self, config: Config) -> dict[str, Config]:
        """`hf_quant_config.json`, which says the same in other words."""
        quantization: Config = {"quant_algo": config["quant_algo"], "kv_cache_quant_algo": None}
        if config["quant_algo"] == "NVFP4":
            quantization["group_size"] = BLOCK
        quantization["exclude_modules"] = list(config["ignore"])
        return {SIDECAR: {"producer": dict(config["producer"]), "quantization": quantization}}

    def parse_config(self, config: Config) -> tuple[Format, list[str]]:
        """Reads one algorithm over all linears, as config.json or as hf_quant_config.json declares it."""
        inner = config.get("quantization")
        declared: Config = inner if isinstance(inner, dict) else config
        fmt = _ALGORITHMS[expect(declared, "quant_algo", *_ALGORITHMS)]
        if isinstance(fmt, NVFP4):
            for weights in _weights_of(declared) or [declared]:
                expect({"group_size": BLOCK, **weights}, "group_size", BLOCK)
        return fmt, module_names(declared, "ignore" if "ignore" in declared else "exclude_modules")

    def stored_specs(self, fmt: Format, shape: Shape) -> dict[str, TensorSpec]:
        """The format's parts, single values as scalars, and FP8's `input_scale`."""
        specs = {
            part: TensorSpec(spec.dtype, ()) if spec.shape == (1,) else spec
            for part, spec in fmt.part_specs(shape).items()
        }
        return specs | ({"input_scale": TensorSpec("F32", ())} if isinstance(fmt, FP8) else {})

    def store(self, fmt: Format, parts: Parts, shape: Shape, dtype: str) -> Parts:
        """The parts, single values as scalars; `input_scale` is 1."""
        given = {**parts, "input_scale": np.ones((), np.float32)}
        specs = self.stored_specs(fmt, shape)
        return {part: given[part].reshape(()) if spec.shape == () else given[part] for part, spec in specs.items()}

    def restore(self, fmt: Format, stored: Parts, shape: Shape) -> Parts:
        """The parts in the format's own shapes."""
        return {part: stored[part].reshape(spec.shape) for part, spec in fmt.part_specs(shape).items()}


def _weights_of(config: Mapping[str, Any]) -> list[Config]:
    groups = config.get("config_groups")
    if groups is None:
        return []
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise UnreadableConfigError("quantization_config: config_groups is not an object of groups")
    return [group["weights"] for group in groups.values() if isinstance(group.get("weights"), dict)]
