"""Layout `bitsandbytes`: NF4 as bitsandbytes serializes it (transformers, SGLang, vLLM's plug-in, Surogate)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from surogate_formats.dtypes import FLOATS
from surogate_formats.dynamic_absmax import DYNAMIC_MAP, restore_dynamic, restore_rounded
from surogate_formats.errors import ArtifactError, UsageError
from surogate_formats.format import Format, Parts, Shape, TensorSpec
from surogate_formats.layouts.layout import Config, expect, module_names
from surogate_formats.layouts.quant_state import (
    is_rounded,
    read_offset,
    read_shape,
    read_state,
    state_bytes,
    state_size,
)
from surogate_formats.nf4 import NF4
from surogate_formats.tables import NF4_CODEBOOK

_MAPS = {"quant_map": NF4_CODEBOOK, "nested_quant_map": DYNAMIC_MAP}
_MAP_ERROR = 2.0**-22
"""How far a map may be off ours: the library that computed it rounded its last bits."""


def map_error(key: str, values: Any) -> Any:
    """Which values of `quant_map` or `nested_quant_map` are not those of bitsandbytes' table for it."""
    return ~(np.abs(values - _MAPS[key]) <= _MAP_ERROR)  # a NaN is none of them


class BitsandbytesLayout:
    """`P.weight` U8 [n/2, 1], `P.weight.absmax`, the maps of codes, and a quantization state in JSON.

    With double quantization `P.weight.nested_absmax` and its map, and the mean of absmax in the state.
    """

    name: ClassVar[str] = "bitsandbytes"
    suffixes: ClassVar[dict[str, dict[str, str]]] = {
        "nf4": {
            "codes": "weight",
            "absmax": "weight.absmax",
            "quant_map": "weight.quant_map",
            "nested_absmax": "weight.nested_absmax",
            "nested_quant_map": "weight.nested_quant_map",
            "quant_state": "weight.quant_state.bitsandbytes__nf4",
        }
    }

    fixed: ClassVar[dict[str, dict[str, Any]]] = {"nf4": {"double_quant": "dynamic"}}
    expert_warnings: ClassVar[dict[str, str]] = {
        "nf4": "surogate_load alone loads packed experts in layout bitsandbytes, transformers doesn't; "
        "`skip='experts'` keeps them as they are"
    }
    splits_experts: ClassVar[bool] = False
    dtype_warnings: ClassVar[dict[str, str]] = {
        "nf4": "plain transformers multiplies in bfloat16, whatever the model's dtype"
    }
    way_out: ClassVar[dict[str, str]] = {"nf4": "`layout='surogate'` takes every shape"}
    reader_warnings: ClassVar[dict[str, str]] = {}

    def refusal(self, fmt: Format) -> str | None:
        """Its readers know one double quantization, which isn't the specification's."""
        if not isinstance(fmt, NF4):
            return f"it doesn't store {fmt.name}"
        if fmt.double_quant == "affine":
            return "bitsandbytes doesn't know affine double quantization: use `layout='surogate'`"
        return None

    def keep_reason(self, fmt: Format, shape: Shape) -> str | None:
        """The kernel of its readers for x86 takes absmax by rows: silently wrong where a block spans two."""
        assert isinstance(fmt, NF4)
        if shape[-1] % fmt.block_size == 0:
            return None
        return f"K = {shape[-1]} is not a multiple of {fmt.block_size}, which bitsandbytes' reader on CPUs needs"

    def quantization_config(self, fmt: Format, kept: Sequence[str]) -> Config:
        """`quant_method: bitsandbytes` in 4 bits; the block size stands beside each weight."""
        assert isinstance(fmt, NF4)
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": fmt.double_quant == "dynamic",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(kept),
            "llm_int8_threshold": 6.0,
        }

    def parse_config(self, config: Config) -> tuple[Format, list[str]]:
        """Reads NF4 stored in bytes, with the default block size: `describe` finds the real one."""
        expect(config, "load_in_8bit", False, None)
        expect(config, "load_in_4bit", True)
        expect(config, "bnb_4bit_quant_type", "nf4")
        if "bnb_4bit_quant_storage" in config:
            expect(config, "bnb_4bit_quant_storage", "uint8")
        double = expect({"bnb_4bit_use_double_quant": False, **config}, "bnb_4bit_use_double_quant", True, False)
        return NF4(double_quant="dynamic" if double else "none"), module_names(config, "llm_int8_skip_modules")

    def stored_specs(self, fmt: Format, shape: Shape) -> dict[str, TensorSpec]:
        """See `RecodingLayout`."""
        assert isinstance(fmt, NF4)
        parts = fmt.part_specs(shape)
        values, _, _ = fmt.counts(shape)
        specs = {
            "codes": TensorSpec("U8", (-(-values // 2), 1)),
            "absmax": parts["absmax"],
            "quant_map": TensorSpec("F32", NF4_CODEBOOK.shape),
        }
        if fmt.double_quant == "dynamic":
            specs["nested_absmax"] = parts["nested_absmax"]
            specs["nested_quant_map"] = TensorSpec("F32", DYNAMIC_MAP.shape)
        specs["quant_state"] = TensorSpec("U8", (state_size(fmt, shape),))
        return specs

    def store(self, fmt: Format, parts: Parts, shape: Shape, dtype: str) -> Parts:
        """See `RecodingLayout`."""
        assert isinstance(fmt, NF4)
        offset = float(parts["nested_offset"][0]) if fmt.double_quant == "dynamic" else 0.0
        known: Parts = {
            **parts,
            "codes": parts["codes"].reshape(-1, 1),
            "quant_map": NF4_CODEBOOK,
            "nested_quant_map": DYNAMIC_MAP,
            "quant_state": np.frombuffer(state_bytes(fmt, shape, dtype, offset), np.uint8),
        }
        return {key: known[key] for key in self.stored_specs(fmt, shape)}

    def restore(self, fmt: Format, stored: Parts, shape: Shape) -> Parts:
        """See `RecodingLayout`; takes what bitsandbytes itself wrote, too.

        Stored with double quantization, a weight of a format without it gets the absmax that bitsandbytes restores:
        what is nested in bfloat16 has no other exact form.
        """
        assert isinstance(fmt, NF4)
        state = read_state(stored["quant_state"].tobytes())
        if (state.get("blocksize"), read_shape(state)) != (fmt.block_size, shape):
            raise ArtifactError(f"its quantization state isn't one of {list(shape)} in blocks of {fmt.block_size}")
        for key in _MAPS.keys() & stored.keys():
            self.check_map(key, stored[key])
        parts: Parts = {"codes": stored["codes"].reshape(fmt.part_specs(shape)["codes"].shape)}
        parts["absmax"] = stored["absmax"]
        if fmt.double_quant == "dynamic":
            parts["nested_absmax"] = stored["nested_absmax"]
            parts["nested_offset"] = np.array([read_offset(state)], np.float32)
        elif "nested_absmax" in stored:
            restored = restore_rounded if is_rounded(state) else restore_dynamic
            parts["absmax"] = restored({**stored, "nested_offset": np.array([read_offset(state)], np.float32)})
        return parts

    def check_map(self, key: str, values: Any) -> None:
        """Raises `ArtifactError` if `quant_map` or `nested_quant_map` isn't bitsandbytes' table for it."""
        if map_error(key, values).any():
            raise ArtifactError(f"its {key} isn't the table of bitsandbytes")

    def describe(self, specs: Mapping[str, TensorSpec], quant_state: bytes) -> tuple[NF4, Shape, str]:
        """What a weight of a checkpoint is that has no manifest.

        Args:
            specs: dtype and shape of the module's stored tensors, by the keys of `suffixes`; whoever wrote them.
            quant_state: the bytes of its quantization state.

        Returns:
            The format, the shape [N, K], and the safetensors dtype of the source.

        Raises:
            ArtifactError: it is none that this layout stores; the message says what differs.
        """
        state = read_state(quant_state)
        shape, dtype = read_shape(state), FLOATS.get(str(state.get("dtype")))
        if shape is None or dtype is None:
            raise ArtifactError("its quantization state gives no shape [N, K] or no dtype that can be read")
        fmt = _format(state, double_quant="nested_absmax" in specs)
        expected = self.stored_specs(fmt, shape)
        for key in dict.fromkeys([*expected, *specs]):
            if key != "quant_state" and specs.get(key) != expected.get(key):
                found, wanted = _shown(specs.get(key), "missing"), _shown(expected.get(key), "nothing")
                raise ArtifactError(f"{self.suffixes['nf4'].get(key, key)} is {found}, expected {wanted}")
        return fmt, shape, dtype


def _format(state: Mapping[str, Any], *, double_quant: bool) -> NF4:
    block_size = state.get("blocksize")
    if double_quant:
        read_offset(state)
    try:
        return NF4(block_size if type(block_size) is int else None, "dynamic" if double_quant else "none")  # type: ignore[arg-type]
    except UsageError as error:
        raise ArtifactError(f"its quantization state can't be read: {error}") from error


def _shown(spec: TensorSpec | None, without: str) -> str:
    return f"{spec.dtype} {list(spec.shape)}" if spec else without
