"""Layouts: names, shapes and config.json as written in full, refusals, and the way back."""

import json

import numpy as np
import pytest
from formats.cases import FORMATS, NF4_FORMATS, NVFP4_FORMATS, name_of

from surogate_formats.errors import ArtifactError, UsageError
from surogate_formats.format import to_dict
from surogate_formats.fp8 import FP8
from surogate_formats.layouts import (
    LAYOUTS,
    LayoutRefusesError,
    UnreadableConfigError,
    layout_of_config,
    pack,
    settle,
    stored_tensors,
    unpack,
)
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_formats.registry import FORMATS as REGISTRY
from surogate_formats.registry import from_dict

BF16 = {"scale_dtype": "bfloat16"}

STORED = {
    ("nf4", "surogate"): (
        {},
        {
            "weight": ("U8", (6, 16)),
            "weight_absmax": ("U8", (3,)),
            "weight_absmax_scale": ("F32", (1,)),
            "weight_absmax_offset": ("F32", (1,)),
        },
    ),
    ("nf4-plain", "surogate"): (
        {"double_quant": "none"},
        {"weight": ("U8", (6, 16)), "weight_absmax": ("F32", (3,))},
    ),
    ("nf4-dynamic", "bitsandbytes"): (
        {"double_quant": "dynamic"},
        {
            "weight": ("U8", (96, 1)),
            "weight.absmax": ("U8", (3,)),
            "weight.quant_map": ("F32", (16,)),
            "weight.nested_absmax": ("F32", (1,)),
            "weight.nested_quant_map": ("F32", (256,)),
            "weight.quant_state.bitsandbytes__nf4": ("U8", (172,)),
        },
    ),
    ("fp4", "compressed-tensors"): (
        {},
        {
            "weight_packed": ("U8", (6, 16)),
            "weight_scale": ("F8_E4M3", (6, 2)),
            "weight_global_scale": ("F32", (1,)),
        },
    ),
    ("fp8-tensor", "compressed-tensors"): (
        {"scaling": "tensor"},
        {"weight": ("F8_E4M3", (6, 32)), "weight_scale": ("BF16", (1,))},
    ),
    ("fp8-channel", "compressed-tensors"): (
        {"scaling": "channel"},
        {"weight": ("F8_E4M3", (6, 32)), "weight_scale": ("BF16", (6, 1))},
    ),
    ("fp8-block", "hf-fp8"): (
        {"scaling": "block"},
        {"weight": ("F8_E4M3", (6, 32)), "weight_scale_inv": ("F32", (1, 1))},
    ),
}
"""(format, default layout) to parameters and what is stored for a weight [6, 32]: suffix to dtype and shape."""

WEIGHTS_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
WEIGHTS_FP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
}


def compressed_tensors(packing, weights):
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head", "a.b"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": packing,
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


CONFIGS = [
    (
        NF4(128, "none"),
        {
            "quant_method": "surogate-quant",
            "format": "nf4",
            "layout_version": 1,
            "block_size": 128,
            "double_quant": "none",
            "modules_to_not_convert": ["lm_head", "a.b"],
        },
    ),
    (
        NF4(double_quant="dynamic"),
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": ["lm_head", "a.b"],
            "llm_int8_threshold": 6.0,
        },
    ),
    (NVFP4(), compressed_tensors("nvfp4-pack-quantized", WEIGHTS_FP4)),
    (FP8("tensor", "bfloat16"), compressed_tensors("float-quantized", {**WEIGHTS_FP8, "strategy": "tensor"})),
    (FP8("channel", "bfloat16"), compressed_tensors("float-quantized", {**WEIGHTS_FP8, "strategy": "channel"})),
    (
        FP8("block"),
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "a.b"],
        },
    ),
]


def layout_for(fmt):
    return next(layout for layout in LAYOUTS.values() if layout.refusal(fmt) is None)


@pytest.mark.parametrize(("key", "parameters", "stored"), [(key, *row) for key, row in STORED.items()], ids=str)
def test_default_layout_and_what_it_stores(key, parameters, stored):
    fmt, layout = settle(key[0].partition("-")[0], parameters)
    assert layout.name == key[1]
    found = stored_tensors(layout, fmt, "m.up", (6, 32)).values()
    assert {tensor.name: (tensor.spec.dtype, tensor.spec.shape) for tensor in found} == {
        f"m.up.{suffix}": spec for suffix, spec in stored.items()
    }


@pytest.mark.parametrize(("fmt", "config"), CONFIGS, ids=lambda value: name_of(value) or "")
def test_quantization_config_in_full_and_back(fmt, config):
    layout = layout_for(fmt)
    written = layout.quantization_config(fmt, ["lm_head", "a.b"])
    assert json.loads(json.dumps(written)) == config
    assert layout_of_config(config) is layout
    parsed, kept = layout.parse_config(config)
    assert kept == ["lm_head", "a.b"]
    assert parsed == fmt


@pytest.mark.parametrize("fmt", NVFP4_FORMATS, ids=name_of)
def test_how_nvfp4_was_chosen_is_no_part_of_its_layout(fmt):
    layout = layout_for(fmt)
    assert layout.quantization_config(fmt, []) == layout.quantization_config(NVFP4(), [])


@pytest.mark.parametrize("fmt", [*NF4_FORMATS, *(fmt for fmt, _ in CONFIGS[1:])], ids=name_of)
def test_pack_and_unpack_are_inverse_and_blind_to_other_tensors(fmt):
    layout = layout_for(fmt)
    shape = (6, 32)
    parts = fmt.quantize(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    stored = pack(layout, fmt, "m.up", parts, shape)
    assert list(stored) == [tensor.name for tensor in stored_tensors(layout, fmt, "m.up", shape).values()]
    back = unpack(layout, fmt, "m.up", {"m.up.bias": np.zeros(3), **stored}, shape)
    assert back.keys() == parts.keys()
    assert all(back[part].tobytes() == parts[part].tobytes() for part in parts)


@pytest.mark.parametrize("fmt", [NF4(), NVFP4(), FP8("tensor", "bfloat16")], ids=name_of)
def test_a_part_that_is_missing_or_of_another_shape_or_dtype_is_named(fmt):
    layout = layout_for(fmt)
    stored = pack(layout, fmt, "m.up", fmt.quantize(np.ones((6, 32), np.float32)), (6, 32))
    for name, array in stored.items():
        with pytest.raises(ArtifactError, match=f"{name} is missing"):
            unpack(layout, fmt, "m.up", {key: value for key, value in stored.items() if key != name}, (6, 32))
        for wrong in (np.zeros((9, 9), array.dtype), array.astype(np.int16)):
            with pytest.raises(ArtifactError, match=rf"{name} is \w+ \[.*\], expected"):
                unpack(layout, fmt, "m.up", {**stored, name: wrong}, (6, 32))


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
def test_formats_round_trip_through_json(fmt):
    assert from_dict(json.loads(json.dumps(to_dict(fmt)))) == fmt


@pytest.mark.parametrize(
    ("name", "parameters", "layout", "message"),
    [
        ("nf4", {}, "hf-fp8", "it doesn't store nf4; use surogate"),
        ("nf4", {}, "compressed-tensors", "it doesn't store nf4; use surogate"),
        ("fp4", {}, "surogate", "it doesn't store fp4; use compressed-tensors"),
        ("fp4", {}, "hf-fp8", "it doesn't store fp4"),
        ("fp8", {}, "surogate", "it doesn't store fp8; use compressed-tensors and hf-fp8"),
        ("fp8", {"scaling": "block"}, "compressed-tensors", "use `layout='hf-fp8'`"),
        ("fp8", {"scaling": "tensor"}, "hf-fp8", "use `layout='compressed-tensors'`"),
        ("fp8", {"scaling": "channel"}, "hf-fp8", "use `layout='compressed-tensors'`"),
        ("fp8", {"scale_dtype": "float32"}, "compressed-tensors", "`scale_dtype` must be bfloat16"),
        ("fp8", {"scaling": "block", **BF16}, "hf-fp8", "float32 scales"),
    ],
)
def test_pairs_that_readers_take_wrongly_are_refused(name, parameters, layout, message):
    with pytest.raises(LayoutRefusesError, match=f"^layout {layout}: .*{message}"):
        settle(name, parameters, layout)


@pytest.mark.parametrize(
    ("name", "parameters", "layout", "message"),
    [
        ("nf5", {}, None, "no format 'nf5'; choose one of nf4, fp4, fp8"),
        ("nf4", {}, "gguf", "no layout 'gguf'; choose one of"),
        ("nf4", {"scaling": "tensor"}, None, "nf4 has no parameter `scaling`; it has `block_size`, `double_quant`"),
        ("fp4", {"block_size": 64}, None, "fp4 has no parameter `block_size`"),
        ("fp8", {"two_d": True}, None, "fp8 has no parameter `two_d`"),
        ("fp8", {"scaling": "row"}, None, "choose one of tensor, channel, block"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(name, parameters, layout, message):
    with pytest.raises(UsageError, match=message):
        settle(name, parameters, layout)


def test_registries_hold_every_class_under_its_own_name():
    assert {cls.name: cls for cls in REGISTRY.values()} == REGISTRY == {"nf4": NF4, "fp4": NVFP4, "fp8": FP8}
    assert all(layout.name == name for name, layout in LAYOUTS.items())


def test_hf_fp8_keeps_what_its_readers_would_clip():
    layout, fmt = LAYOUTS["hf-fp8"], FP8("block")
    assert layout.keep_reason(fmt, (256, 384)) is None
    assert "side 192 is not a multiple of 128" in layout.keep_reason(fmt, (256, 192))
    assert "side 320" in layout.keep_reason(fmt, (320, 128))


def broken(config, path, value):
    config = json.loads(json.dumps(config))
    *parents, last = path.split(".")
    place = config
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return config


@pytest.mark.parametrize(
    ("index", "path", "value"),
    [
        (0, "layout_version", 2),
        (0, "format", "fp4"),
        (0, "block_size", 32),
        (0, "new_parameter", 1),
        (0, "modules_to_not_convert", "lm_head"),
        (0, "modules_to_not_convert", [1]),
        (0, "quant_method", "gptq"),
        (0, "quant_method", None),
        (0, "quant_method", ["surogate"]),
        (1, "load_in_4bit", False),
        (1, "bnb_4bit_quant_type", "fp4"),
        (1, "bnb_4bit_quant_storage", "bfloat16"),
        (1, "bnb_4bit_use_double_quant", "yes"),
        (1, "llm_int8_skip_modules", "lm_head"),
        (2, "quantization_status", "initialized"),
        (2, "format", "mxfp4-pack-quantized"),
        (2, "config_groups", {}),
        (2, "config_groups", None),
        (2, "config_groups.group_0", "weights"),
        (2, "config_groups.group_1", {"targets": ["Linear"]}),
        (2, "config_groups.group_0.weights.num_bits", 8),
        (2, "config_groups.group_0.weights.type", "int"),
        (2, "config_groups.group_0.weights", None),
        (2, "config_groups.group_0.weights", [8]),
        (2, "config_groups.group_0.weights.group_size", 32),
        (3, "config_groups.group_0.weights.strategy", "block"),
        (5, "weight_block_size", [64, 64]),
        (5, "weight_block_size", None),
    ],
)
def test_a_config_that_declares_something_else_is_unreadable(index, path, value):
    config = broken(CONFIGS[index][1], path, value)
    with pytest.raises(UnreadableConfigError, match=r"^quantization_config: "):
        layout_of_config(config).parse_config(config)


@pytest.mark.parametrize("config", [None, {}, [], "surogate"])
def test_no_config_at_all_is_unreadable(config):
    with pytest.raises(UnreadableConfigError, match="quant_method None can't be read; known: surogate"):
        layout_of_config(config)
