"""Checkpoints that somebody has quantized already are recognized by config, by file and by tensors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from surogate_formats.checkpoint import Checkpoint, is_quantized
from surogate_formats.checkpoint.tensor_info import TensorInfo
from surogate_formats.dtypes import BITS


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": None, "text_config": {"quantization_config": {}}}, None),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_4bit": True}}, "an unnamed method"),
        ({"quantization_config": "fp8"}, "an unnamed method"),
        ({"quantization_config": {"quant_method": "\x1b[2J"}}, r"\x1b[2J"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"thinker": {"text_config": {"quantization_config": {"quant_method": "awq"}}}}, "awq"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
    ],
)
def test_quantized_by_its_config(config: dict[str, Any], method: str | None) -> None:
    assert is_quantized(config) == method


@pytest.mark.parametrize(
    ("tensors", "method"),
    [
        ({"p.weight": "F8_E4M3", "p.weight_scale_inv": "F32"}, "fp8"),
        ({"p.weight": "F8_E4M3", "p.weight_scale": "BF16"}, "compressed-tensors or modelopt"),
        ({"p.weight": "U8", "p.weight_scale": "F8_E4M3"}, "compressed-tensors or modelopt"),
        ({"p.weight_packed": "U8", "p.weight_scale": "F8_E4M3"}, "compressed-tensors"),
        ({"p.weight_packed": "I32", "p.weight_scale": "BF16"}, "compressed-tensors"),
        ({"p.weight": "U8", "p.weight.absmax": "F32"}, "bitsandbytes"),
        ({"p.weight": "I8", "p.SCB": "F32"}, "bitsandbytes"),
        ({"p.weight": "U8", "p.weight_absmax": "U8"}, "surogate"),
        ({"p.qweight": "I32", "p.scales": "F16"}, "gptq or awq"),
        ({"p.weight": "U32", "p.scales": "F16"}, "mlx"),
        ({"e.gate_up_proj_blocks": "U8", "e.gate_up_proj_scales": "U8"}, "mxfp4"),
        ({"e.gate_up_proj": "F8_E4M3", "e.gate_up_proj_scale": "F32"}, "compressed-tensors or modelopt"),
        # Not quantized: a scale beside full precision, packed bytes of another module, a mask.
        ({"p.weight": "BF16", "p.weight_scale": "F32"}, None),
        ({"p.weight": "F8_E4M3", "q.weight_scale": "F32"}, None),
        ({"mask": "U8", "p.weight": "BF16"}, None),
    ],
)
def test_quantized_by_its_tensors(tensors: dict[str, str], method: str | None) -> None:
    infos = {name: TensorInfo(name, dtype, (1,), 0, BITS[dtype] // 8) for name, dtype in tensors.items()}
    assert is_quantized({}, tensors=infos) == method


def test_quantized_by_a_file_of_modelopt(tmp_path: Path) -> None:
    save_file({"x": np.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.is_quantized() is None
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.is_quantized() == "modelopt"
