"""A GGUF file of a Llama, dequantized into transformers' model.

transformers' own loader gives the same bytes in twice the time: it parses the header anew for the config and
for the weights, and builds gguf's table of tensor names once a module.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIG_KEYS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "vocab_size": "llama.vocab_size",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
HEADS_KEYS = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}


def load_gguf_llama(file: Path) -> Any:
    """Returns a `LlamaForCausalLM` in bf16 with the file's weights, dequantized to fp32 and rounded once.

    Args:
        file: a GGUF file of architecture `llama`; embeddings are tied where it holds no `output.weight`.

    Raises:
        KeyError: a metadata key or a tensor's name isn't a Llama's.
        RuntimeError: a weight is missing or has another shape than the metadata says.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(file)
    metadata = {key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1}
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        name, weight = _as_transformers(tensor.name, values, metadata)
        weights[name] = torch.tensor(weight).to(torch.bfloat16)
    tied = "lm_head.weight" not in weights
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    rope = {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]}
    sizes = {ours: metadata[theirs] for ours, theirs in CONFIG_KEYS.items()}
    config = LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=tied, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def _as_transformers(name: str, values: "NDArray[Any]", metadata: dict[str, Any]) -> tuple[str, "NDArray[Any]"]:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name], values
    _, layer, part, suffix = name.split(".")
    if part in HEADS_KEYS:
        values = _halves_apart(values, metadata[HEADS_KEYS[part]])
    return f"model.layers.{layer}.{BLOCK_NAMES[part]}.{suffix}", values


def _halves_apart(values: "NDArray[Any]", heads: int) -> "NDArray[Any]":
    """GGUF's rotary pairs are rows (2i, 2i+1) of a head, transformers' are rows (i, i + head_dim/2)."""
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
