"""What transformers' Trainer asks of all modules before every micro-step, in half the host's time or less.

A step without a CUDA graph waits for the host. With adapters a model of 28 layers has 2600 modules, through which
`nn.Module` goes by a generator a level, and once more for each question.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class QuickWalks:
    """Mixed into the class of a packed model."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers counts a model that isn't packed: the values of weights, without block and global scales."""
        modules = _modules(self)
        seen: set[int] = set()
        if exclude_embeddings:
            seen = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
        total = 0
        for module in modules:
            packed = () if only_trainable else module.__dict__.get("packed_names", ())
            total += _values(module) if packed else 0
            for name, parameter in module._parameters.items():
                if parameter is None or name in packed or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                if parameter.requires_grad or not only_trainable:
                    total += parameter.numel()
        return total

    def train(self, mode: bool = True) -> Any:
        """As every module's `train`; does nothing where nothing would change."""
        modules: list[Any] = list(_modules(self))
        settled = all(module.training is mode for module in modules)
        if settled and not modules[0].use_kernels and all(type(module).train in _plain() for module in modules[1:]):
            return self
        return super().train(mode)  # type: ignore[misc]


@cache
def _plain() -> tuple[Any, ...]:
    """What doesn't matter where the mode stays; the second chooses kernels anew, if the model uses some."""
    from transformers import PreTrainedModel

    return nn.Module.train, PreTrainedModel.train


def _values(module: Any) -> int:
    values: int = module.packed_values
    return values


def _modules(model: Any) -> list[nn.Module]:
    """Every module once, the model first."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting.extend(module._modules.values())
    return list(found.values())
