"""Groups of linears that loaders fuse, in dense models and in mixtures of experts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surogate_quantize.fused_groups import amax_groups, decision_groups, fused_groups

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def mixtral(layers=2, experts=3):
    return [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}.weight"
        for layer in range(layers)
        for expert in range(experts)
        for leaf in ("w1", "w2", "w3")
    ]


def test_fused_groups():
    attention = [f"model.layers.0.self_attn.{leaf}.weight" for leaf in ATTENTION]
    groups = fused_groups([*reversed(attention), "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
    assert groups[attention[1]] == tuple(attention[:3])
    assert groups[attention[3]] == (attention[3],)
    assert groups["model.layers.1.self_attn.q_proj.weight"] == ("model.layers.1.self_attn.q_proj.weight",)
    assert groups["model.norm.weight"] == ("model.norm.weight",)


@pytest.mark.parametrize(
    ("leaves", "group"),
    [
        ("gate_proj up_proj down_proj", "gate_proj up_proj"),
        ("w1 w2 w3", "w1 w3"),
        ("w1 w2 c_proj", "w2 w1"),
        ("c_fc_0 c_fc_1 c_proj", "c_fc_0 c_fc_1"),
        ("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj", "q_a_proj kv_a_proj_with_mqa"),
        ("query key value", "query key value"),
        ("q k v o", "q k v"),
        ("in_proj_qkv in_proj_z out_proj", "in_proj_qkv in_proj_z"),
        ("q_proj k_proj o_proj", "q_proj k_proj"),
        ("kv_a_proj_with_mqa kv_b_proj q_proj", "q_proj"),
        ("receptance key value", "receptance"),
        ("up_proj down_proj", "up_proj"),
    ],
)
def test_fused_rows(leaves, group):
    groups = fused_groups(f"layers.0.part.{leaf}.weight" for leaf in leaves.split())
    members = tuple(f"layers.0.part.{leaf}.weight" for leaf in group.split())
    assert groups[members[0]] == members
    assert all(groups[name] == (name,) for name in groups.keys() - set(members))


def test_biases_are_in_no_group():
    assert fused_groups(["a.q_proj.bias", "a.k_proj.bias"]) == {
        "a.q_proj.bias": ("a.q_proj.bias",),
        "a.k_proj.bias": ("a.k_proj.bias",),
    }


def test_moe_groups():
    prefix = "model.layers.1.block_sparse_moe.experts"
    w1, w2, w3 = (f"{prefix}.2.{leaf}.weight" for leaf in ("w1", "w2", "w3"))
    assert fused_groups(mixtral())[w3] == (w1, w3)
    gate_up = tuple(f"{prefix}.{e}.{leaf}.weight" for e in range(3) for leaf in ("w1", "w3"))
    assert amax_groups(mixtral())[w1] == gate_up
    assert amax_groups(mixtral())[w2] == tuple(f"{prefix}.{e}.w2.weight" for e in range(3))
    assert set(decision_groups(mixtral())[w2]) == {name for name in mixtral() if name.startswith(prefix)}


def test_shared_experts_and_attention_are_in_no_experts_group():
    names = [f"model.layers.0.mlp.shared_experts.{leaf}.weight" for leaf in MLP]
    assert amax_groups([*names, *mixtral()])[names[0]] == tuple(names[:2])


def test_experts_are_ordered_by_number():
    names = [f"layers.0.mlp.experts.{expert}.down_proj.weight" for expert in (10, 9, 2)]
    assert amax_groups(names)[names[0]] == (names[2], names[1], names[0])


LEAVES = (*ATTENTION, *MLP, "w1", "w2", "w3", "query", "key", "value", "experts.0.w1", "experts.1.w3", "experts.10.w2")


@given(st.lists(st.sampled_from([f"layers.{i}.{leaf}.weight" for i in (0, 1) for leaf in LEAVES]), unique=True))
def test_groups_are_a_partition_whatever_the_order(names):
    for grouping in (fused_groups, amax_groups, decision_groups):
        groups = grouping(names)
        assert list(groups) == names
        assert all(name in groups[name] for name in names)
        assert all(groups[member] == groups[name] for name in names for member in groups[name])
        assert grouping(reversed(names)) == groups
