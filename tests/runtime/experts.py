"""Tiny mixtures of experts of each family, as checkpoints that hold every expert's weights by themselves."""

import json

import torch
import transformers
from runtime.artifacts import is_block_linear
from safetensors.torch import load_file, save_file

from surogate_load import open_artifact
from surogate_load.experts.module import QuantizedExperts

SIZES = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 32,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False}  # fmt: skip
FAMILIES = {
    "qwen3": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 128, "norm_topk_prob": True},
    ),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "intermediate_size": 128}),
    "deepseek": (
        transformers.DeepseekV3Config,
        {"n_routed_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 128, "n_group": 1, "topk_group": 1,
         "first_k_dense_replace": 0, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 32, "v_head_dim": 32,
         "qk_nope_head_dim": 32, "num_key_value_heads": 4, "num_mtp_layers": 0},
    ),
    "gpt-oss": (
        transformers.GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128, "swiglu_limit": 0.4},
    ),
}  # fmt: skip
"""Name to config class and sizes; gpt-oss with a limit that is reached."""

ROUTERS = ("mlp.gate.", "block_sparse_moe.gate.", "mlp.router.")
DISK = {"mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2"))}
NAMES = ("mlp.experts", ("gate_proj", "up_proj", "down_proj"))
IDS = torch.randint(0, 64, (3, 11), generator=torch.Generator().manual_seed(0))


def dense_model(family, dtype=torch.bfloat16, **changes):
    config, sizes = FAMILIES[family]
    torch.manual_seed(0)
    made = config(**{**SIZES, **sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(made, experts_implementation="eager", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "experts" in name or "gate." in name or "router" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def split(tensors):
    """gpt-oss' experts as llm-compressor writes them: each by itself, gate and up apart, [out, in]."""
    for name, tensor in tensors.items():
        experts, _, projection = name.rpartition(".")
        ending = "bias" if projection.endswith("_bias") else "weight"
        if not experts.endswith("mlp.experts") or tensor.dim() + (ending == "bias") != 3:
            yield name, tensor
            continue
        for number, each in enumerate(tensor):
            weight = each if ending == "bias" else each.t()
            roles = {"gate_proj": weight[::2], "up_proj": weight[1::2]} if "gate_up" in name else {"down_proj": weight}
            for role, rows in roles.items():
                yield f"{experts}.{number}.{role}.{ending}", rows


class ByExpert:
    """What tests' writers take for a model."""

    def __init__(self, model):
        self._model = model

    def save_pretrained(self, directory):
        self._model.save_pretrained(directory)
        tensors = dict(split(load_file(directory / "model.safetensors")))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
        self.directory = directory

    def state_dict(self):
        return load_file(self.directory / "model.safetensors")


def is_packed(name, shape):
    return is_block_linear(name, shape) and not any(router in name for router in ROUTERS)


def reference(path, family, dtype=torch.float32, weights=None):
    """transformers' own eager model of the weights that an artifact stands for, read one by one."""
    tensors = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()
               if tensor.is_floating_point() and tensor.element_size() > 1}  # fmt: skip
    if weights is None:
        with open_artifact(path) as artifact:
            weights = {name: artifact[name].dequantize() for name in artifact}
    tensors |= {f"{name}.weight": weight for name, weight in weights.items()}
    model = dense_model(family, torch.float32)
    state = {name: tensors[name] if name in tensors else fused(name, tensors, family) for name in model.state_dict()}
    model.load_state_dict(state)
    return model.to(dtype).eval()


def fused(name, tensors, family):
    experts, roles = DISK.get(family, NAMES)
    renamed = name.replace("mlp.experts", experts).replace("mlp.gate", experts.replace("experts", "gate"))
    if renamed in tensors:
        return tensors[renamed]
    module, _, projection = renamed.rpartition(".")
    ending = "bias" if projection.endswith("_bias") else "weight"
    members = [
        [tensors[f"{module}.{number}.{role}.{ending}"] for number in range(4)]
        for role in (roles[:2] if "gate_up" in projection else roles[2:])
    ]
    if family != "gpt-oss":
        return torch.cat([torch.stack(member) for member in members], 1)
    stacked = torch.stack([torch.stack(member) for member in members], 2).flatten(1, 2)
    return stacked if ending == "bias" else stacked.transpose(1, 2).contiguous()


def stored_bytes(directory):
    """Every tensor's dtype, shape and bytes, and the config."""
    found = {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    return found, json.loads((directory / "config.json").read_text())["quantization_config"]


def experts_of(model):
    """The packed experts of the first layer."""
    return next(module for module in model.modules() if isinstance(module, QuantizedExperts))
