"""Which layers of a model read the same activations."""

from __future__ import annotations

from collections.abc import Iterator

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
