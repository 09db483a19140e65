"""Tiny transformers models as artifacts on disk."""

import hashlib
import json
from dataclasses import asdict

import numpy as np
import torch
from safetensors.numpy import save_file

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.format import to_dict
from surogate_formats.layouts import pack, settle
from surogate_formats.manifest import MANIFEST_NAME, Manifest, TensorRecord
from surogate_formats.recipe import Recipe


def tiny_llama(**changes):
    """A random Llama of two blocks in bfloat16; all sides divide by 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    torch.manual_seed(0)
    config = LlamaConfig(**{**settings, **changes})
    return LlamaForCausalLM(config).to(getattr(torch, str(config.dtype).removeprefix("torch.")))


def is_block_linear(name, shape):
    return len(shape) == 2 and name.endswith(".weight") and (".layers." in name or ".layer." in name)


def write_artifact(model, directory, fmt, *, recipe=None, layout=None, lora=None, keep=(), amax=None):
    """Saves a model and packs the linears of its blocks, but for names that hold one of `keep`; gives the directory.

    `amax` is that of every fused group, where the format shares it.
    """
    dense = directory / "dense"
    model.save_pretrained(dense)
    fmt, chosen = settle(fmt.name, vars(fmt), layout)
    out = directory / f"{fmt.name}-{chosen.name}"
    out.mkdir()
    tensors, records, kept = {}, {}, ["lm_head"]
    with Checkpoint.open(dense) as source:
        for name, entry in source.tensors.items():
            array = source.read(name)
            quantize = is_block_linear(name, array.shape) and not any(part in name for part in keep)
            stored = {name: array}
            if quantize:
                module = name.removesuffix(".weight")
                parts = fmt.quantize(array.astype(np.float32), amax)
                stored = pack(chosen, fmt, module, parts, array.shape, entry.info.dtype)
            elif is_block_linear(name, array.shape):
                kept.append(name.removesuffix(".weight"))
            tensors |= stored
            hashes = {key: hashlib.sha256(value.tobytes()).hexdigest() for key, value in stored.items()}
            decision = "quantize" if quantize else "keep"
            bits = sum(value.nbytes for value in stored.values()) * 8 / array.size
            records[name] = TensorRecord(decision, "test", entry.info.dtype, array.shape, bits, hashes)
        config = {**source.config, "quantization_config": chosen.quantization_config(fmt, kept)}
    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=1))
    manifest = Manifest(
        tool_version="0",
        source="dense",
        files=(),
        format=to_dict(fmt),
        layout=chosen.name,
        options={},
        recipe=asdict(recipe or Recipe()),
        lora=lora or {},
        sidecars={},
        tensors=records,
    )
    (out / MANIFEST_NAME).write_text(manifest.to_json())
    return out
