"""Makes tiny random checkpoints of many architectures, as `save_pretrained` writes them."""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from staging import staged
from surogate_formats.errors import SurogateError, UsageError

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")
STD_RANGE = (0.02, 0.05)
OUTLIERS_PER_MATRIX = 8
OUTLIER_STDS = 12.0


class TinyCheckpointError(UsageError):
    """No such kind or dtype, an output directory in use, or a number of shards that can't be reached."""


@dataclass(frozen=True)
class Tiny:
    """One kind of checkpoint: transformers' classes and what its config has beyond the common values."""

    model: str
    config: str
    sizes: dict[str, Any]


COMMON = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}
ODD = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "head_dim": 32}
QWEN3_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
SHARED_EXPERT = {"shared_expert_intermediate_size": 256}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA3 = {"sliding_window": 64, "query_pre_attn_scalar": 64}
GPT2 = {"n_embd": 256, "n_inner": 512, "n_layer": 2, "n_head": 4, "n_positions": 256}
BERT = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}

KINDS = {
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", DECODER),
    "llama-tied": Tiny("LlamaForCausalLM", "LlamaConfig", DECODER | TIED),
    "llama-odd": Tiny("LlamaForCausalLM", "LlamaConfig", DECODER | ODD),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", DECODER),
    "qwen3-tied": Tiny("Qwen3ForCausalLM", "Qwen3Config", DECODER | TIED),
    "qwen3-moe": Tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", DECODER | QWEN3_EXPERTS),
    "qwen2-moe": Tiny("Qwen2MoeForCausalLM", "Qwen2MoeConfig", DECODER | QWEN3_EXPERTS | SHARED_EXPERT),
    "mixtral": Tiny("MixtralForCausalLM", "MixtralConfig", DECODER | LOCAL_EXPERTS),
    "gemma3": Tiny("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER | TIED | GEMMA3),
    "phi3": Tiny("Phi3ForCausalLM", "Phi3Config", DECODER),
    "gpt2": Tiny("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": Tiny("BertForMaskedLM", "BertConfig", BERT),
    "gpt-oss": Tiny("GptOssForCausalLM", "GptOssConfig", DECODER | LOCAL_EXPERTS),
}


def make_tiny(kind: str, out: Path, dtype: str = "bfloat16", seed: int = 0, shards: int = 1) -> Path:
    """Writes a random checkpoint: config, generation config where the model has one, weights.

    Matrices are normal with a standard deviation between 0.02 and 0.05, one for each, and hold eight outliers
    of twelve standard deviations; vectors are their initial value (1 or 0) plus normal noise of 0.05. Equal
    arguments give equal bytes.

    Args:
        kind: a key of `KINDS`.
        out: a directory that doesn't exist or is empty.
        dtype: one of `DTYPES`.
        seed: of the weights.
        shards: number of safetensors files.

    Returns:
        `out`.

    Raises:
        TinyCheckpointError: an unknown kind or dtype, `out` is in use, or no cut gives `shards` files.
    """
    if kind not in KINDS:
        raise TinyCheckpointError(f"no kind {kind!r}: use one of {', '.join(KINDS)}")
    if dtype not in DTYPES:
        raise TinyCheckpointError(f"no dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise TinyCheckpointError(f"{out} is in use: give a directory that is empty or doesn't exist")
    model = _random_model(KINDS[kind], dtype, seed)
    with staged(out) as staging:
        model.save_pretrained(staging, max_shard_size=_shard_size(model, shards))
    return out


def _random_model(tiny: Tiny, dtype: str, seed: int) -> Any:
    import torch
    import transformers

    config = getattr(transformers, tiny.config)(**(COMMON | tiny.sizes))
    model = getattr(transformers, tiny.model)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            _fill(parameter, generator)
    return model.to(getattr(torch, dtype))


def _fill(parameter: "torch.Tensor", generator: "torch.Generator") -> None:
    import torch

    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() == 1:
        parameter.copy_(parameter.mean().round() + 0.05 * noise)
        return
    low, high = STD_RANGE
    std = low + (high - low) * torch.rand((), generator=generator)
    where = torch.randint(parameter.numel(), (OUTLIERS_PER_MATRIX,), generator=generator)
    noise.view(-1)[where] = OUTLIER_STDS * noise.view(-1)[where].sign()
    parameter.copy_(std * noise)


def _shard_size(model: Any, shards: int) -> int:
    """Returns the `max_shard_size` in bytes that gives `shards` files.

    transformers fills shards in turn with whole tensors, so an equal share may be too little.
    """
    total: int = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for percent in range(100, 200, 5):
        size = total * percent // (100 * max(shards, 1))
        with tempfile.TemporaryDirectory() as trial:
            model.save_pretrained(trial, max_shard_size=size)
            if len(list(Path(trial).glob("*.safetensors"))) == shards:
                return size
    raise TinyCheckpointError(f"the weights can't be cut into {shards} shards: ask for fewer")


def main() -> int:
    """The command line: prints the directory; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", help=", ".join(KINDS))
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1, help="number of safetensors files")
    arguments = parser.parse_args()
    try:
        print(make_tiny(**vars(arguments)))
    except SurogateError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
