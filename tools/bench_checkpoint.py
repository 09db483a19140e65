"""Makes a random llama-shaped checkpoint of any size, tensor by tensor, for timing whole runs."""

import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]

VOCABULARY = 32000
HIDDEN = 2048
INTERMEDIATE = 5632
KEY_VALUE = 512
HEAD = 64
STD = 0.02
POOL = 1 << 24
"""Random values that are drawn; tensors are filled from them at different offsets."""


def make_checkpoint(out: Path, gigabytes: float) -> Path:
    """Writes `config.json` and `model.safetensors` into the new directory `out`.

    Args:
        out: the directory.
        gigabytes: about the size of the weights, in units of 10^9 bytes.

    Returns:
        The safetensors file, synced by nobody.
    """
    embedding = 2 * VOCABULARY * HIDDEN
    layers = max(1, round((gigabytes * 1e9 / 2 - embedding) / sum(a * b for a, b in _linears().values())))
    shapes = dict(_shapes(layers))
    out.mkdir()
    (out / "config.json").write_text(json.dumps(_config(layers)))
    file = out / "model.safetensors"
    _write(file, shapes)
    return file


def _linears() -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEY_VALUE, HIDDEN),
        "self_attn.v_proj": (KEY_VALUE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }


def _shapes(layers: int) -> Iterator[tuple[str, Shape]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in _linears().items():
            yield f"{prefix}{name}.weight", shape
        yield f"{prefix}input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // HEAD,
        "num_key_value_heads": KEY_VALUE // HEAD,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _write(file: Path, shapes: dict[str, Shape]) -> None:
    header: dict[str, object] = {}
    position = 0
    for name, shape in shapes.items():
        end = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pool = (np.random.default_rng(0).standard_normal(POOL, np.float32) * np.float32(STD)).astype(ml_dtypes.bfloat16)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for index, shape in enumerate(shapes.values()):
            stream.write(_values(pool, index, int(np.prod(shape))))


def _values(pool: NDArray[ml_dtypes.bfloat16], index: int, count: int) -> memoryview:
    """Takes `count` values of the pool, from a place of the tensor's own on and around."""
    values = np.resize(np.roll(pool, -index * 7919), count)
    return values.view(np.uint8).data
