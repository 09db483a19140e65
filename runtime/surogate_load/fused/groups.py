"""Which layers of a model read the same activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from surogate_load.linear import QuantizedLinear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that transformers' decoder layers call with the same tensor."""


def groups_of(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...], list[QuantizedLinear]]]:
    """(parent, names of its children, those or what adapters are put around) of quantized layers that do."""
    for parent in list(model.modules()):
        for names in GROUPS:
            children = [parent._modules.get(name) for name in names]
            members = [getattr(child, "base_layer", child) for child in children]
            if all(type(member) is QuantizedLinear for member in members):
                yield parent, names, members  # type: ignore[misc]


def side_by_side(model: nn.Module, layers: Sequence[QuantizedLinear]) -> Iterator[list[tuple[QuantizedLinear, str]]]:
    """Every packed tensor of some layers once, by layer and name: in one list those that make one tensor if fused.

    Args:
        model: around the layers.
        layers: of which tensors are wanted; a group of which some are not among them counts as single layers.
    """
    grouped: set[tuple[QuantizedLinear, str]] = set()
    for _, _, members in groups_of(model):
        if len({member.kind.format for member in members}) == 1 and set(members) <= set(layers):
            for names in zip(*(member.part_names for member in members), strict=True):
                run = list(zip(members, names, strict=True))
                grouped.update(run)
                yield run
    for layer in layers:
        yield from ([(layer, name)] for name in layer.packed_names if (layer, name) not in grouped)
