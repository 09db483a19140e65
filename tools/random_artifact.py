"""Makes an artifact of random packed weights from a transformers config: as large as the real one, without the source.

Speed doesn't depend on the values; they are such that activations stay finite.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from surogate_formats.dtypes import NUMPY
from surogate_formats.format import Format, TensorSpec, to_dict
from surogate_formats.layouts import Layout, settle, stored_tensors
from surogate_formats.manifest import MANIFEST_NAME, Manifest, TensorRecord
from surogate_formats.recipe import Recipe
from surogate_formats.registry import make_format

QWEN3 = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "14B": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
    "32B": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}
"""The shapes of the Qwen3 models, all with 8 key-value heads of 128."""

PARAMETERS = {"nf4": {}, "fp4": {}, "fp8": {"scale_dtype": "bfloat16"}}
"""Format name to the parameters with which the quantizer's first layout stores it."""

QWEN3_30B_A3B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
}
"""The shape of Qwen3-30B-A3B."""

EXPERT_ROLES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""A parameter of transformers' fused experts to what stands of each expert in its place on disk."""

Stored = tuple[dict[str, NDArray], dict[str, TensorRecord]]
"""Packed tensors and the manifest's records by name."""

SHARD_BYTES = 1 << 30
"""What 4 GB of bfloat16 become as NF4."""

TIED = ("0.6B", "1.7B", "4B")
_STD = 0.02


def qwen3_config(size: str) -> PretrainedConfig:
    """The config of a Qwen3 model by its size."""
    return Qwen3Config(
        vocab_size=151936,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=size in TIED,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
        **QWEN3[size],
    )


def qwen3_moe_config(**changes: int) -> PretrainedConfig:
    """The config of Qwen3-30B-A3B with some of its sizes changed."""
    return Qwen3MoeConfig(
        norm_topk_prob=True,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
        **{**QWEN3_30B_A3B, **changes},
    )


def write_random_artifact(config: PretrainedConfig, fmt: Format, out: Path) -> Path:
    """Writes an artifact whose decoder linears and experts are packed; gives its directory."""
    fmt, layout = settle(fmt.name, vars(fmt))
    out.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weight_map, records = {}, {}
    for number, (tensors, made) in enumerate(_shards(_packed(model, fmt, layout))):
        shard = f"model-{number:05d}.safetensors"
        save_file(tensors, out / shard)
        weight_map.update(dict.fromkeys(tensors, shard))
        records.update(made)
    index = {"metadata": {}, "weight_map": weight_map}
    entry = layout.quantization_config(fmt, ["lm_head"])
    files = {
        "config.json": json.dumps({**config.to_dict(), "quantization_config": entry}),
        "model.safetensors.index.json": json.dumps(index),
    }
    for name, text in files.items():
        (out / name).write_text(text)
    manifest = Manifest(
        tool_version="random",
        source="random",
        files=(),
        format=to_dict(fmt),
        layout=layout.name,
        options={},
        recipe=asdict(Recipe()),
        lora={},
        sidecars={name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()},
        tensors=records,
    )
    (out / MANIFEST_NAME).write_text(manifest.to_json())
    return out


def _shards(weights: Iterator[Stored]) -> Iterator[Stored]:
    """Several weights at a time, as many as make a file of some size."""
    tensors, records = {}, {}
    for more, made in weights:
        tensors |= more
        records |= made
        if sum(array.nbytes for array in tensors.values()) >= SHARD_BYTES:
            yield tensors, records
            tensors, records = {}, {}
    if tensors:
        yield tensors, records


def _packed(model: nn.Module, fmt: Format, layout: Layout) -> Iterator[Stored]:
    """The tensors and records of each parameter."""
    rng = np.random.default_rng(0)
    head = getattr(model, "lm_head", None)
    tied = model.config.tie_word_embeddings
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    for name, parameter in model.named_parameters():
        module, shape = name.removesuffix(".weight"), tuple(parameter.shape)
        experts, _, projection = name.rpartition(".")
        if tied and name.startswith("lm_head"):
            continue
        if experts.endswith(".experts") and projection in EXPERT_ROLES:
            roles = EXPERT_ROLES[projection]
            weight = (shape[1] // len(roles), shape[2])
            names = [f"{experts}.{number}.{role}" for number in range(shape[0]) for role in roles]
        elif module in linears and name.endswith(".weight"):
            names, weight = [module], shape
        else:
            record = TensorRecord("keep", "random", "BF16", shape, 16.0, {name: "0" * 64})
            yield {name: _random_dense(shape, rng)}, {name: record}
            continue
        tensors, records = {}, {}
        for each in names:
            stored = stored_tensors(layout, fmt, each, weight)
            made = {tensor.name: random_part(part, tensor.spec, rng) for part, tensor in stored.items()}
            bits = 8 * sum(array.nbytes for array in made.values()) / (weight[0] * weight[1])
            records[f"{each}.weight"] = TensorRecord(
                "quantize", "random", "BF16", weight, bits, dict.fromkeys(made, "0" * 64)
            )
            tensors |= made
        yield tensors, records


def random_part(part: str, spec: TensorSpec, rng: np.random.Generator) -> NDArray:
    """A part of a packed weight whose values are some hundredths."""
    dtype, size = NUMPY[spec.dtype], int(np.prod(spec.shape))
    if part in ("absmax_scale", "absmax_offset"):
        return np.full(spec.shape, _STD / 254 if part.endswith("scale") else 2 * _STD, dtype)
    if part == "global_scale":
        return np.full(spec.shape, 64.0 / _STD, dtype)
    if part == "codes" and spec.dtype == "F8_E4M3":
        return rng.integers(0x20, 0x70, size, np.uint8).view(dtype).reshape(spec.shape)
    if spec.dtype == "F8_E4M3":
        return np.full(spec.shape, 32.0, dtype)
    if spec.dtype == "U8":
        return rng.integers(0, 256, size, np.uint8).reshape(spec.shape)
    return np.full(spec.shape, _STD / 100, dtype)


def _random_dense(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray:
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    block = (rng.standard_normal(1 << 20, np.float32) * _STD).astype(ml_dtypes.bfloat16)
    return np.resize(block, shape)


def main() -> None:
    """Writes one artifact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help=f"a directory with config.json, or a Qwen3 size: {', '.join(QWEN3)}")
    parser.add_argument("--format", choices=PARAMETERS, default="nf4")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    known = arguments.config in QWEN3
    config = qwen3_config(arguments.config) if known else AutoConfig.from_pretrained(arguments.config)
    print(write_random_artifact(config, make_format(arguments.format, PARAMETERS[arguments.format]), arguments.out))


if __name__ == "__main__":
    main()
