"""A model's modules and parameters by what is asked of them before every batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from surogate_load.experts.module import QuantizedExperts
from surogate_load.linear import QuantizedLinear


class Survey:
    """Lists what `MicroStep` looks at: walking through a model takes as long as a third of a small model's micro-step.

    Modules that come later are not in it.

    Args:
        model: to list.

    Attributes:
        model: as given.
        modules: all of them.
        trained: parameters that want gradients.
        experts: packed ones.
    """

    def __init__(self, model: nn.Module) -> None:
        """Walks through the model."""
        self.model = model
        self.modules = list(model.modules())
        self._parameters = list(model.parameters())
        self.trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        self.experts = [module for module in self.modules if isinstance(module, QuantizedExperts)]
        self._adapters = [module for module in self.modules if hasattr(module, "disable_adapters")]
        self._layers = [module for module in self.modules if isinstance(module, QuantizedLinear)]
        self._checkpointing = [module for module in self.modules if hasattr(module, "gradient_checkpointing")]

    @property
    def checkpointed(self) -> list[nn.Module]:
        """Modules whose checkpointing is on."""
        return [module for module in self._checkpointing if module.gradient_checkpointing]

    def state(self) -> tuple[Any, ...]:
        """What a captured graph depends on: equal as long as the model trains the same parameters, where they were.

        And through the same adapters, modes and recipe.
        """
        active = getattr(self.model, "active_adapters", None)
        return (
            id(self.model),
            [parameter.data_ptr() if parameter.requires_grad else 0 for parameter in self._parameters],
            list(active) if isinstance(active, list) else [],
            [module.disable_adapters for module in self._adapters],
            [_scaling(module) for module in self._adapters],
            [layer._modules["recipe"] for layer in self._layers],
            [module.training for module in self.modules],
            [module.gradient_checkpointing for module in self._checkpointing],
            getattr(getattr(self.model, "config", None), "_attn_implementation", None),
        )


def _scaling(layer: nn.Module) -> dict[str, Any]:
    scaling = layer.__dict__.get("scaling")
    return dict(scaling) if isinstance(scaling, dict) else {}
