"""Layout bitsandbytes: what it stores beside the parts, its quantization state, and what it refuses."""

import json

import numpy as np
import pytest

from surogate_formats.dynamic_absmax import DYNAMIC_MAP
from surogate_formats.errors import ArtifactError
from surogate_formats.format import TensorSpec
from surogate_formats.layouts import LAYOUTS, LayoutRefusesError, pack, settle, stored_tensors, unpack
from surogate_formats.nf4 import NF4
from surogate_formats.tables import NF4_CODEBOOK

LAYOUT = LAYOUTS["bitsandbytes"]
SHAPE = (6, 128)
FORMATS = [NF4(64, "dynamic"), NF4(64, "none"), NF4(128, "dynamic"), NF4(128, "none")]
STATE = "m.up.weight.quant_state.bitsandbytes__nf4"


def weight(scale=1.0):
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32) * np.float32(scale)


def packed(fmt, dtype="BF16", scale=1.0):
    return pack(LAYOUT, fmt, "m.up", fmt.quantize(weight(scale)), SHAPE, dtype)


def specs_of(stored):
    names = {name: key for key, name in LAYOUT.suffixes["nf4"].items()}
    dtypes = {np.dtype(np.uint8): "U8", np.dtype(np.float32): "F32"}
    return {
        names[name.removeprefix("m.up.")]: TensorSpec(dtypes[array.dtype], array.shape)
        for name, array in stored.items()
    }


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_state_says_what_the_weight_is_in_a_size_that_is_known_before(dtype):
    fmt = NF4(128, "dynamic")
    size = stored_tensors(LAYOUT, fmt, "m.up", SHAPE)["quant_state"].spec.shape
    for scale in (1.0, 1e-30, 1e30, 0.0):
        stored = packed(fmt, dtype, scale)
        assert stored[STATE].shape == size
        assert json.loads(stored[STATE].tobytes()) == {
            "quant_type": "nf4",
            "blocksize": 128,
            "dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
            "shape": [6, 128],
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": float(fmt.quantize(weight(scale))["nested_offset"][0]),
        }


def test_without_double_quantization_nothing_is_nested():
    stored = packed(NF4(64, "none"))
    assert not any("nested" in name for name in stored)
    assert json.loads(stored[STATE].tobytes()).keys() == {"quant_type", "blocksize", "dtype", "shape"}


def test_the_maps_stand_beside_each_weight():
    stored = packed(NF4(64, "dynamic"))
    assert stored["m.up.weight.quant_map"].tobytes() == NF4_CODEBOOK.tobytes()
    assert stored["m.up.weight.nested_quant_map"].tobytes() == DYNAMIC_MAP.tobytes()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_weight_without_a_manifest_is_described_by_its_own_tensors(fmt, dtype):
    stored = packed(fmt, dtype)
    assert LAYOUT.describe(specs_of(stored), stored[STATE].tobytes()) == (fmt, SHAPE, dtype)


def changed(**entries):
    state = json.loads(packed(NF4(64, "dynamic"))[STATE].tobytes()) | entries
    return json.dumps({key: value for key, value in state.items() if value is not None}).encode()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"\xff", "no JSON"),
        (b"[]", "isn't one of nf4"),
        (changed(quant_type="fp4"), "isn't one of nf4"),
        (changed(nested_blocksize=128), "nested in blocks of 128 float32"),
        (changed(nested_dtype="float16"), "nested in blocks of 256 float16"),
        (changed(shape=[768]), "no shape"),
        (changed(shape=None), "no shape"),
        (changed(dtype="int8"), "no dtype"),
        (changed(blocksize=256), "block_size` is 256"),
        (changed(blocksize=None), "block_size` is None"),
        (changed(blocksize=128), "weight.absmax is .*, expected"),
        (changed(shape=[6, 64]), "weight is .*, expected"),
    ],
    ids=str,
)
def test_what_the_layout_never_stores_is_not_described(state, message):
    with pytest.raises(ArtifactError, match=message):
        LAYOUT.describe(specs_of(packed(NF4(64, "dynamic"))), state)


def test_a_tensor_that_the_layout_does_not_know_is_named():
    specs = specs_of(packed(NF4(64, "none")))
    for wrong in ({"nested_quant_map": TensorSpec("F32", (256,))}, {"codes": TensorSpec("BF16", (192, 1))}):
        with pytest.raises(ArtifactError, match="expected"):
            LAYOUT.describe({**specs, **wrong}, packed(NF4(64, "none"))[STATE].tobytes())


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("weight.quant_map", NF4_CODEBOOK[::-1].copy(), "quant_map isn't the table"),
        ("weight.nested_quant_map", DYNAMIC_MAP[::-1].copy(), "nested_quant_map isn't the table"),
        ("weight.quant_state.bitsandbytes__nf4", {"blocksize": 128}, r"isn't one of \[6, 128\] in blocks of 64"),
        ("weight.quant_state.bitsandbytes__nf4", {"shape": [12, 64]}, r"isn't one of \[6, 128\] in blocks of 64"),
        ("weight.quant_state.bitsandbytes__nf4", {"nested_offset": float("nan")}, "no finite float32"),
        ("weight.quant_state.bitsandbytes__nf4", {"nested_offset": 1e39}, "no finite float32"),
        ("weight.quant_state.bitsandbytes__nf4", {"nested_offset": None}, "no finite float32"),
    ],
)
def test_what_would_be_dequantized_wrongly_is_refused(name, array, message):
    fmt = NF4(64, "dynamic")
    stored = packed(fmt)
    if isinstance(array, dict):
        array = np.frombuffer(changed(**array).ljust(stored[STATE].size), np.uint8)
    with pytest.raises(ArtifactError, match=rf"^m\.up: .*{message}"):
        unpack(LAYOUT, fmt, "m.up", {**stored, f"m.up.{name}": array}, SHAPE)


def test_rows_that_share_a_block_stay_unquantized():
    assert LAYOUT.keep_reason(NF4(64, "dynamic"), (10, 576)) is None
    assert "K = 576 is not a multiple of 128" in LAYOUT.keep_reason(NF4(128, "none"), (10, 576))


def test_which_double_quantization_goes_where():
    def kinds(parameters, layout):
        fmt, found = settle("nf4", parameters, layout)
        return fmt.double_quant, found.name

    for default in ({}, {"double_quant": None}):
        assert kinds(default, None) == ("affine", "surogate")
        assert kinds(default, "bitsandbytes") == ("dynamic", "bitsandbytes")
    assert kinds({"double_quant": "none"}, "bitsandbytes") == ("none", "bitsandbytes")
    assert kinds({"double_quant": "dynamic"}, None) == ("dynamic", "bitsandbytes")
    with pytest.raises(LayoutRefusesError, match="doesn't know affine double quantization: use `layout='surogate'`"):
        settle("nf4", {"double_quant": "affine"}, "bitsandbytes")
    with pytest.raises(LayoutRefusesError, match="use `layout='bitsandbytes'`"):
        settle("nf4", {"double_quant": "dynamic"}, "surogate")
    with pytest.raises(LayoutRefusesError, match="it doesn't store fp8"):
        settle("fp8", {}, "bitsandbytes")
