"""Single experts' weights read out of tensors that hold all of a layer."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from surogate_formats.checkpoint import Checkpoint
from surogate_formats.checkpoint import expert_slices as module

EXPERTS, HIDDEN, INNER = 3, 10, 6
LAYER = "model.layers.0.mlp.experts"


def write(folder, kind, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


def whole(kind, dtype=np.float16):
    """Every expert's weights [out, in] by role, and the tensors that hold them."""
    random = np.random.default_rng(0)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    weights = {role: random.normal(size=(EXPERTS, *shape)).astype(dtype) for role, shape in shapes.items()}
    if kind == "gpt_oss":
        gate_up = np.stack([weights["gate_proj"], weights["up_proj"]], 2).reshape(EXPERTS, 2 * INNER, HIDDEN)
        stored = {"gate_up_proj": gate_up.transpose(0, 2, 1), "down_proj": weights["down_proj"].transpose(0, 2, 1)}
    else:
        gate_up = np.concatenate([weights["gate_proj"], weights["up_proj"]], 1)
        stored = {"gate_up_proj": gate_up, "down_proj": weights["down_proj"]}
    return weights, {f"{LAYER}.{name}": np.ascontiguousarray(array) for name, array in stored.items()}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_5_moe"])
@pytest.mark.parametrize("piece", [1, 64, 1 << 20])
def test_every_byte_range_of_every_weight(kind, dtype, piece, tmp_path, monkeypatch):
    """Rows, parts of rows, and what lies over their bounds; stored rows in one piece and in many."""
    monkeypatch.setattr(module, "PIECE", piece)
    weights, tensors = whole(kind, dtype)
    with Checkpoint.open(write(tmp_path / "model", kind, tensors)) as checkpoint:
        for role, arrays in weights.items():
            for number, array in enumerate(arrays):
                name = f"{LAYER}.{number}.{role}.weight"
                assert checkpoint.entry(name).info.shape == array.shape
                np.testing.assert_array_equal(checkpoint.read(name), array)
                data = array.tobytes()
                for start in range(0, len(data), 7):
                    for size in (1, array.itemsize * array.shape[1], 33, len(data)):
                        buffer = bytearray(size)
                        count = checkpoint.read_into(name, memoryview(buffer), start)
                        assert buffer[:count] == data[start : start + size]


def test_order_is_that_of_the_experts(tmp_path):
    _, tensors = whole("gpt_oss")
    with Checkpoint.open(write(tmp_path / "model", "gpt_oss", tensors)) as checkpoint:
        parts = [part.info.name for part in checkpoint.fused_experts[f"{LAYER}.gate_up_proj"]]
        assert parts == [f"{LAYER}.{n}.{role}.weight" for n in range(3) for role in ("gate_proj", "up_proj")]
        assert checkpoint.tensors.keys() == tensors.keys()
        assert checkpoint.find(f"{LAYER}.3.gate_proj.weight") is None
        with pytest.raises(KeyError):
            checkpoint.read(f"{LAYER}.3.gate_proj.weight")


def odd(change):
    _, tensors = whole("gpt_oss")
    gate_up, down = (tensors[f"{LAYER}.{name}"] for name in ("gate_up_proj", "down_proj"))
    return {
        "no other half": {f"{LAYER}.gate_up_proj": gate_up},
        "other experts": {**tensors, f"{LAYER}.down_proj": down[:2].copy()},
        "other sides": {**tensors, f"{LAYER}.down_proj": down[:, :4].copy()},
        "two axes": {f"{LAYER}.gate_up_proj": gate_up[0].copy(), f"{LAYER}.down_proj": down[0].copy()},
        "packed": {name: array.astype(np.uint8) for name, array in tensors.items()},
        "no experts": {name: array[:0].copy() for name, array in tensors.items()},
        "names taken": {**tensors, f"{LAYER}.1.up_proj.weight": np.zeros(2, np.float16)},
        "too many": {name: np.zeros((5000, *array.shape[1:]), np.float16) for name, array in tensors.items()},
        "elsewhere": {name.replace("experts", "mixture"): array for name, array in tensors.items()},
    }[change]


CHANGES = ["no other half", "other experts", "other sides", "two axes", "packed", "no experts", "names taken",
           "too many", "elsewhere"]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_not_told_apart(change, tmp_path):
    with Checkpoint.open(write(tmp_path / "model", "gpt_oss", odd(change))) as checkpoint:
        assert not checkpoint.fused_experts


@pytest.mark.parametrize("kind", ["llama4", "", None, ["gpt_oss"]])
def test_unknown_model_types_are_not_told_apart(kind, tmp_path):
    with Checkpoint.open(write(tmp_path / "model", kind, whole("gpt_oss")[1])) as checkpoint:
        assert not checkpoint.fused_experts
