"""Linears that loaders fuse: they share scales, and are quantized or kept together.

vLLM and others load {q, k, v} and {gate, up} as one matrix with one global scale and one scheme, and all experts of a
layer as one tensor. A group that is half quantized fails there, or is silently wrong.
"""

import re
from collections.abc import Callable, Container, Iterable
from typing import Final

Groups = dict[str, tuple[str, ...]]
_Key = Callable[[str], str]

_FUSED: Final = tuple(
    tuple(row.split())
    for row in (
        "q_proj k_proj v_proj",
        "q_a_proj kv_a_proj_with_mqa",
        "wq_a wkv_a_with_mqa",
        "gate_proj up_proj",
        "w1 w3",
        "c_fc_0 c_fc_1",
        "fc11 fc12",
        "wi_0 wi_1",
        "in_proj_qkv in_proj_z",
        "query key value",
        "query_proj key_proj value_proj",
        "q_lin k_lin v_lin",
        "wq wk wv",
        "Wq Wk Wv",
        "q k v",
    )
)
"""Sibling modules in the order of the fused matrix. Without its first member a row is another architecture's."""

_ROW: Final = {leaf: row for row in _FUSED for leaf in row}
_ROW_BESIDE_C_PROJ: Final = {**_ROW, **dict.fromkeys(("w1", "w2"), ("w2", "w1"))}
"""Qwen's first models call gate w2, up w1 and down c_proj."""

_EXPERT: Final = re.compile(r"(?P<layer>(?:.*\.)?experts)\.(?:expert_)?(?P<expert>\d+)\.(?P<module>.+)\.weight$")


def fused_groups(names: Iterable[str]) -> Groups:
    """Return for every tensor the members of its fused group, itself included.

    Members are the weights of sibling modules (of each expert, gate and up), in the order of the fused matrix. A tensor
    that is never fused is a group of its own.
    """
    known = dict.fromkeys(names)
    groups: Groups = {}
    for name in known:
        row = _fused_row(name, known)
        led = bool(row) and row[0] in known
        groups[name] = tuple(member for member in row if member in known) if led else (name,)
    return groups


def amax_groups(names: Iterable[str]) -> Groups:
    """Return for every tensor the tensors that share NVFP4's amax with it, itself included, in a fixed order.

    As `fused_groups`, but gate and up of all experts of a layer are one group, and down of all experts another.
    """
    return _merge_experts(list(names), _expert_role)


def decision_groups(names: Iterable[str]) -> Groups:
    """Return for every tensor the tensors that must be quantized or kept together with it, itself included.

    As `fused_groups`, but all weights of all experts of a layer are one group: fused loaders have one scheme for them.
    """
    return _merge_experts(list(names), lambda module: "")


def _fused_row(name: str, known: Container[str]) -> tuple[str, ...]:
    """Return the names of all possible members of a tensor's fused group, or nothing."""
    path, _, parameter = name.rpartition(".")
    parent, dot, leaf = path.rpartition(".")
    if parameter != "weight":
        return ()
    rows = _ROW_BESIDE_C_PROJ if f"{parent}{dot}c_proj.weight" in known else _ROW
    return tuple(f"{parent}{dot}{member}.weight" for member in rows.get(leaf, ()))


def _expert_role(module: str) -> str:
    """Return one word for the modules of an expert that are fused with each other."""
    return _ROW.get(module, (module,))[0]


def _merge_experts(names: list[str], role: _Key) -> Groups:
    """Join the fused groups of a layer's experts that have the same role."""
    groups = fused_groups(names)
    merged: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in groups:
        if match := _EXPERT.match(name):
            merged.setdefault((match["layer"], role(match["module"])), []).append((int(match["expert"]), name))
    for members in merged.values():
        ordered = tuple(name for _, name in sorted(members))
        groups.update(dict.fromkeys(ordered, ordered))
    return groups
