"""Layout modelopt: what is stored, what is declared, what is refused, and the values its readers compute."""

import json

import numpy as np
import pytest
from formats.cases import weights
from hypothesis import given, settings

from surogate_formats.errors import UsageError
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
from surogate_formats.nvfp4 import NVFP4
from surogate_formats.rounding import from_e2m1_codes, to_e2m1_codes, unpack_nibbles
from surogate_formats.version import VERSION

LAYOUT = LAYOUTS["modelopt"]
FP4 = NVFP4(step="multiply")
PRODUCER = {"name": "surogate-quant", "version": VERSION}

CONFIG_FP4 = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "config_groups": {
        "group_0": {
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head", "a.b"],
    "producer": PRODUCER,
}
CONFIG_FP8 = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
            "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head", "a.b"],
    "producer": PRODUCER,
}


def weight(shape=(6, 32)):
    return (np.random.default_rng(0).standard_normal(shape) * 0.03).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("fp4", {"weight": ("U8", (6, 16)), "weight_scale": ("F8_E4M3", (6, 2)), "weight_scale_2": ("F32", ())}),
        ("fp8", {"weight": ("F8_E4M3", (6, 32)), "weight_scale": ("F32", ()), "input_scale": ("F32", ())}),
    ],
)
def test_what_is_stored(name, stored):
    fmt, layout = settle(name, {}, "modelopt")
    found = stored_tensors(layout, fmt, "m.up", (6, 32)).values()
    assert {tensor.name: (tensor.spec.dtype, tensor.spec.shape) for tensor in found} == {
        f"m.up.{suffix}": spec for suffix, spec in stored.items()
    }
    arrays = pack(layout, fmt, "m.up", fmt.quantize(weight()), (6, 32))
    assert {key: value.shape for key, value in arrays.items()} == {t.name: t.spec.shape for t in found}
    back = unpack(layout, fmt, "m.up", arrays, (6, 32))
    assert fmt.dequantize(back, (6, 32)).tobytes() == fmt.dequantize(fmt.quantize(weight()), (6, 32)).tobytes()
    if name == "fp8":
        assert arrays["m.up.input_scale"] == 1


@settings(max_examples=40, deadline=None)
@given(weights())
@np.errstate(over="ignore")
def test_multiplying_gives_the_values_of_dividing(drawn):
    x = drawn.fit(FP4).f32
    parts, divided = FP4.quantize(x), NVFP4().quantize(x)
    assert parts["codes"].tobytes() == divided["codes"].tobytes()
    assert parts["scale"].tobytes() == divided["scale"].tobytes()
    assert parts["global_scale"] * divided["global_scale"] == 1
    values = FP4.dequantize(parts, x.shape)
    assert values.tobytes() == NVFP4().dequantize(divided, x.shape).tobytes()
    # ModelOpt's documented formula: codes * (weight_scale * weight_scale_2).
    codes = from_e2m1_codes(unpack_nibbles(parts["codes"], x.shape[1], first_high=False))
    step = parts["scale"].astype(np.float32) * parts["global_scale"]
    assert values.tobytes() == (codes * np.repeat(step, 16, axis=1)).tobytes()


@pytest.mark.parametrize("rule", ["pow2", "amax"])
def test_codes_are_chosen_against_the_readers_step(rule):
    fmt = NVFP4(two_d=False, four_over_six=False, global_scale=rule, step="multiply")
    x = weight((8, 64))
    parts = fmt.quantize(x)
    step = np.repeat(parts["scale"].astype(np.float32) * parts["global_scale"], 16, axis=1)
    np.testing.assert_array_equal(unpack_nibbles(parts["codes"], 64, first_high=False), to_e2m1_codes(x / step))


@pytest.mark.parametrize(("fmt", "config"), [(FP4, CONFIG_FP4), (FP8("tensor"), CONFIG_FP8)], ids=["fp4", "fp8"])
def test_the_config_in_full_and_back(fmt, config):
    written = LAYOUT.quantization_config(fmt, ["lm_head", "a.b"])
    assert json.loads(json.dumps(written)) == config
    assert layout_of_config(config) is LAYOUT
    assert LAYOUT.parse_config(config) == (fmt, ["lm_head", "a.b"])
    sidecar = LAYOUT.sidecars(written)["hf_quant_config.json"]
    assert LAYOUT.parse_config(sidecar) == (fmt, ["lm_head", "a.b"])


def test_the_sidecar_in_full():
    quantization = {"kv_cache_quant_algo": None, "exclude_modules": ["lm_head", "a.b"]}
    assert LAYOUT.sidecars(CONFIG_FP8) == {
        "hf_quant_config.json": {"producer": PRODUCER, "quantization": {"quant_algo": "FP8", **quantization}}
    }
    fp4 = {"quant_algo": "NVFP4", "group_size": 16, **quantization}
    assert LAYOUT.sidecars(CONFIG_FP4) == {"hf_quant_config.json": {"producer": PRODUCER, "quantization": fp4}}


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("nf4", {}, "it doesn't store nf4; use surogate"),
        ("fp4", {"global_scale": "amax"}, "`global_scale` must be pow2"),
        ("fp4", {"step": "divide"}, "`step` must be multiply"),
        ("fp8", {"scaling": "channel"}, "not one a channel: use `layout='compressed-tensors'`"),
        ("fp8", {"scaling": "block"}, "not one a block: use `layout='hf-fp8'`"),
        ("fp8", {"scale_dtype": "bfloat16"}, "stores float32 scales"),
    ],
)
def test_what_modelopt_does_not_store(name, parameters, message):
    with pytest.raises(LayoutRefusesError, match=f"^layout modelopt: .*{message}"):
        settle(name, parameters, "modelopt")


def test_the_other_layouts_store_no_multiplying_scale():
    with pytest.raises(LayoutRefusesError, match=r"^layout compressed-tensors: .*`step` must be divide"):
        settle("fp4", {"step": "multiply"}, "compressed-tensors")
    assert settle("fp4", {"step": "multiply"})[1] is LAYOUT
    with pytest.raises(UsageError, match="`step` is 'add'"):
        settle("fp4", {"step": "add"})


@pytest.mark.parametrize(
    "config",
    [
        {**CONFIG_FP4, "quant_algo": "W4A8_AWQ"},
        {**CONFIG_FP4, "quant_algo": "NVFP4_AWQ"},
        {**CONFIG_FP4, "quant_algo": "MIXED_PRECISION"},
        {**CONFIG_FP4, "quant_algo": None},
        {**CONFIG_FP4, "config_groups": {"group_0": {"weights": {"group_size": 32}}}},
        {**CONFIG_FP4, "config_groups": ["group_0"]},
        {**CONFIG_FP4, "ignore": "lm_head"},
        {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4", "group_size": 32}},
        {"quant_method": "modelopt"},
    ],
)
def test_what_is_declared_otherwise_is_unreadable(config):
    with pytest.raises(UnreadableConfigError, match=r"^quantization_config: "):
        LAYOUT.parse_config(config)
