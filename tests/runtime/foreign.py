"""Tiny Llamas packed as others pack them: by compressed-tensors itself, or by the formulas of the others' documents.

Every kind comes with the float32 weights that its own makers compute from what is stored.
"""

import json
from dataclasses import dataclass

import torch
from runtime.artifacts import is_block_linear, tiny_llama
from safetensors.torch import save_file

E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass
class Foreign:
    """A directory, and the float32 weight of each packed module."""

    path: object
    weights: dict


def ct_arguments(**arguments):
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(type="float", symmetric=True, **arguments)


def ct_config(packing, weights, activations=None, status="compressed", **others):
    group = {
        "targets": ["Linear"],
        "weights": json.loads(weights.model_dump_json()),
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": status,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **others,
    }


NVFP4_ARGUMENTS = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": E4M3}


def ct_nvfp4(weight, **beside):
    """compressed-tensors packs; its own dequantization, in float32, says what was meant."""
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments = ct_arguments(**NVFP4_ARGUMENTS)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    global_scale = generate_gparam(weight.min(), weight.max())
    blocks = weight.reshape(weight.shape[0], -1, 16)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments, global_scale)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale, "weight_zero_point": zero}
    packed = NVFP4PackedCompressor.compress(state, scheme)
    stored = {name: packed[name] for name in ("weight_packed", "weight_scale", "weight_global_scale")}
    meant = dequantize(
        x_q=nibbles(stored["weight_packed"]),
        scale=stored["weight_scale"].float(),
        args=arguments,
        global_scale=stored["weight_global_scale"],
        dtype=torch.float32,
    )
    return stored | beside, meant


def ct_fp8(weight, strategy, dtype=torch.float32, **beside):
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    structure = {"block_structure": [128, 128]} if strategy == "block" else {}
    arguments = ct_arguments(num_bits=8, strategy=strategy, **structure)
    if strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    elif strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        tiles = weight.reshape(weight.shape[0] // 128, 128, -1, 128)
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    scale, zero = calculate_qparams(low, high, arguments)
    scale = scale.to(dtype)
    codes = quantize(x=weight, scale=scale.float(), zero_point=zero, args=arguments, dtype=E4M3)
    meant = dequantize(x_q=codes, scale=scale.float(), args=arguments, dtype=torch.float32)
    return {"weight": codes, "weight_scale": scale} | beside, meant


def nibbles(packed):
    codes = torch.stack((packed & 15, packed >> 4), -1).reshape(packed.shape[0], -1)
    return E2M1[codes.int()]


def hf_fp8(weight, dtype=torch.float32):
    """DeepSeek-V3's tiles: W = codes * weight_scale_inv."""
    tiles = weight.reshape(weight.shape[0] // 128, 128, -1, 128)
    scale = (tiles.abs().amax((1, 3)) / 448).to(dtype)
    spread = scale.float()[:, None, :, None]
    codes = (tiles / spread).clamp(-448, 448).to(E4M3)
    return {"weight": codes.reshape(weight.shape), "weight_scale_inv": scale}, (codes.float() * spread).reshape(
        weight.shape
    )


def hf_tensor(weight):
    scale = weight.abs().amax() / 448
    codes = (weight / scale).clamp(-448, 448).to(E4M3)
    stored = {"weight": codes, "weight_scale_inv": scale, "activation_scale": torch.tensor(0.02)}
    return stored, codes.float() * scale


def modelopt_fp8(weight):
    scale = weight.abs().amax() / 448
    codes = (weight / scale).to(E4M3)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.03)}, codes.float() * scale


def modelopt_nvfp4(weight, **beside):
    """weight_scale_2 = amax / (6 * 448), W = codes * (weight_scale * weight_scale_2)."""
    scale_2 = weight.abs().amax() / (6 * 448)
    blocks = weight.reshape(weight.shape[0], -1, 16)
    scale = (blocks.abs().amax(-1) / 6 / scale_2).clamp(2.0**-9, 448).to(E4M3)
    step = scale.float() * scale_2
    grid = E2M1[:8]
    ties = (grid[1:] + grid[:-1]) / 2
    index = torch.bucketize((blocks / step[..., None]).abs(), ties)
    codes = (index + 8 * (blocks < 0)).to(torch.uint8).reshape(weight.shape)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    meant = (nibbles(packed).reshape(blocks.shape) * step[..., None]).reshape(weight.shape)
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": scale_2} | beside, meant


def modelopt_config(algorithm, **others):
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **others}


TOKENS_IN_8_BITS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
KINDS = {
    "ct-nvfp4": (ct_nvfp4, lambda: ct_config("nvfp4-pack-quantized", ct_arguments(**NVFP4_ARGUMENTS))),
    "ct-w4a4": (
        lambda weight: ct_nvfp4(weight, input_global_scale=torch.tensor([90.0])),
        lambda: ct_config(
            "nvfp4-pack-quantized",
            ct_arguments(**NVFP4_ARGUMENTS),
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
            kv_cache_scheme={"num_bits": 8, "type": "float"},
        ),
    ),
    "ct-fp8-tensor": (
        lambda weight: ct_fp8(weight, "tensor"),
        lambda: ct_config("float-quantized", ct_arguments(num_bits=8, strategy="tensor")),
    ),
    "ct-fp8-channel": (
        lambda weight: ct_fp8(weight, "channel", torch.bfloat16),
        lambda: ct_config("float-quantized", ct_arguments(num_bits=8, strategy="channel")),
    ),
    "ct-fp8-block": (
        lambda weight: ct_fp8(weight, "block"),
        lambda: ct_config("float-quantized", ct_arguments(num_bits=8, strategy="block", block_structure=[128, 128])),
    ),
    "ct-w8a8": (
        lambda weight: ct_fp8(weight, "channel", input_scale=torch.tensor([0.01])),
        lambda: ct_config("naive-quantized", ct_arguments(num_bits=8, strategy="channel"), TOKENS_IN_8_BITS, "frozen"),
    ),
    "hf-fp8": (
        hf_fp8,
        lambda: {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "hf-fp8-bf16": (
        lambda weight: hf_fp8(weight, torch.bfloat16),
        lambda: {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "hf-tensor": (
        hf_tensor,
        lambda: {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    ),
    "modelopt-fp8": (modelopt_fp8, lambda: modelopt_config("FP8", kv_cache_scheme={"num_bits": 8})),
    "modelopt-nvfp4": (
        lambda weight: modelopt_nvfp4(weight, input_scale=torch.tensor(0.004)),
        lambda: modelopt_config("NVFP4"),
    ),
    "modelopt-w4a16": (modelopt_nvfp4, lambda: modelopt_config("W4A16_NVFP4")),
}
"""Kind to what packs a float32 weight, giving what is stored and what it means, and to its `quantization_config`."""

UNUSED = {
    "ct-w4a4": "input_activations, kv_cache_scheme, input_global_scale",
    "ct-w8a8": "input_activations, input_scale",
    "hf-tensor": "activation_scheme static, activation_scale",
    "modelopt-fp8": "kv_cache_scheme, input_scale, k_scale",
    "modelopt-nvfp4": "input_scale",
}
"""What is passed over, in the words of the warning."""


def write_foreign(directory, kind, *, packs=is_block_linear, model=None, edit=None):
    """Saves a model, and the same packed; `edit` may change tensors and config before they are written."""
    model = model or tiny_llama(num_key_value_heads=4)
    model.save_pretrained(directory / "dense")
    pack, config_of = KINDS[kind]
    tensors, weights = {}, {}
    for name, tensor in model.state_dict().items():
        if not packs(name, tensor.shape):
            tensors[name] = tensor
            continue
        module = name.removesuffix(".weight")
        stored, weights[module] = pack(tensor.float())
        tensors |= {f"{module}.{suffix}": value.contiguous() for suffix, value in stored.items()}
    if kind == "modelopt-fp8":
        tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    config = json.loads((directory / "dense" / "config.json").read_text())
    config["quantization_config"] = config_of()
    if edit is not None:
        edit(tensors, config)
    path = directory / kind
    path.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config, indent=1))
    return Foreign(path, weights)
