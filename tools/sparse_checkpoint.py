"""Makes checkpoints of any size that take no room on the disk: every tensor is a hole, and reads as zeros."""

import json
from pathlib import Path

SHARD = 4 << 30
"""Bytes of a file, about."""

HIDDEN, MLP, VOCABULARY = 4096, 14336, 32000

BLOCK = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}


def make_sparse(out: Path, size: int) -> Path:
    """Writes a Llama in bf16 of about so many bytes, in shards.

    Args:
        out: a directory that doesn't exist.
        size: bytes of all tensors; at least one block and the embeddings.

    Returns:
        `out`.
    """
    out.mkdir(parents=True)
    block = sum(2 * rows * columns for rows, columns in BLOCK.values())
    blocks = max(round((size - 4 * VOCABULARY * HIDDEN) / block), 1)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    for index in range(blocks):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in BLOCK.items()}
    shards: list[dict[str, tuple[int, int]]] = [{}]
    room = SHARD
    for name, (rows, columns) in shapes.items():
        if room < 2 * rows * columns:
            shards.append({})
            room = SHARD
        shards[-1][name] = (rows, columns)
        room -= 2 * rows * columns
    files = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        _write(out / file, tensors)
    weight_map = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": blocks}
    (out / "config.json").write_text(json.dumps(config))
    return out


def _write(path: Path, tensors: dict[str, tuple[int, int]]) -> None:
    header, position = {}, 0
    for name, (rows, columns) in tensors.items():
        end = position + 2 * rows * columns
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
