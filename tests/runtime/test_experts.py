"""Packed experts compute what transformers' own eager experts compute on the dequantized weights, bit for bit."""

import pytest
import torch
from runtime.experts import IDS, ByExpert, dense_model, experts_of, is_packed, reference, stored_bytes
from runtime.foreign import write_foreign

from surogate_formats.artifact import Artifact
from surogate_load import load_model
from surogate_load.experts.module import DOWN, GATE_UP
from surogate_load.kernels import experts as kernels

OURS = [
    *(("qwen3", kind) for kind in ("nf4", "nf4-dynamic", "fp4", "fp4-modelopt", "fp8-tensor", "fp8-channel",
                                   "fp8-block", "fp8-modelopt")),
    ("mixtral", "nf4"),
    ("mixtral", "fp4-modelopt"),
    ("deepseek", "nf4"),
    ("deepseek", "fp8-block"),
    ("gpt-oss", "nf4"),
    ("gpt-oss", "fp8-channel"),
]  # fmt: skip
OTHERS = [("qwen3", "ct-w4a4"), ("mixtral", "modelopt-nvfp4"), ("deepseek", "hf-fp8"), ("gpt-oss", "ct-fp8-channel")]


def in_whole_tiles(name, shape):
    return is_packed(name, shape) and all(side % 128 == 0 for side in shape)


def assert_same_files(saved, original):
    after, before = stored_bytes(saved), stored_bytes(original)
    assert after[0].keys() == before[0].keys()
    different = [name for name in before[0] if after[0][name] != before[0][name]]
    assert [name for name in different if ".mlp.gate." not in name] == []  # transformers keeps DeepSeek's in float32
    assert after[1] == before[1]


@pytest.mark.parametrize(("family", "kind"), OURS)
def test_logits_are_those_of_the_dense_model_and_saving_gives_the_same_bytes(expert_artifact, family, kind, tmp_path):
    path = expert_artifact(family, kind)
    model = load_model(path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, reference(path, family)(IDS).logits)
    load_model(path).save_pretrained(tmp_path)
    assert_same_files(tmp_path, path)
    assert Artifact.open(tmp_path).verify()


@pytest.mark.parametrize("kind", ["nf4", "nf4-dynamic", "fp4-modelopt", "fp8-block"])
def test_the_table_of_a_launch_points_to_every_expert(expert_artifact, kind):
    experts = experts_of(load_model(expert_artifact("qwen3", kind)))
    for name, members in ((GATE_UP, 2), (DOWN, 1)):
        packed, parts = experts.projections[name].kind, experts.parts(name)
        table = kernels._build(parts, packed, torch.bfloat16)
        count = 4 * members
        assert table.weights[:, kernels._COUNT].tolist() == [128 * 128] * count
        assert table.weights[:, 5].tolist() == [2 * 128 * 128 * index for index in range(count)]
        places = [packed.parts_of(parts, expert, member) for expert in range(4) for member in range(members)]
        for part in (0, 1):
            assert table.weights[:, part].tolist() == [place[part].data_ptr() for place in places]
        firsts = table.first_tiles.view(torch.int32).tolist()
        assert firsts == [index * table.tiles // count for index in range(count)]


@pytest.mark.parametrize(("family", "kind"), OTHERS)
def test_what_others_packed(family, kind, tmp_path):
    foreign = write_foreign(tmp_path, kind, packs=in_whole_tiles, model=ByExpert(dense_model(family)))
    model = load_model(foreign.path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, reference(foreign.path, family, weights=foreign.weights)(IDS).logits)
    load_model(foreign.path).save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "again", foreign.path)
