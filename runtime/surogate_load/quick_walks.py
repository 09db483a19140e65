"""What transformers' Trainer asks of all modules before every micro-step, in a tenth of the host's time.

A step waits for the host where Trainer looks at the loss. With adapters a model of 28 layers has 2600 modules, through
which `nn.Module` goes by a generator a level, and once more for each question.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import nn


class QuickWalks:
    """Mixed into the class of a packed model."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers counts a model that isn't packed: the values of weights, without block and global scales."""
        modules = _modules(self)
        parameters = _values_of("_parameters", modules)
        trained = [p is not None and p.requires_grad for p in parameters] if only_trainable else []
        question = (only_trainable, exclude_embeddings, list(map(id, parameters)), trained)
        known: tuple[Any, int] = self.__dict__.get("_known_count", (None, 0))
        if known[0] != question:
            known = question, _count(modules, only_trainable, exclude_embeddings)
            self.__dict__["_known_count"] = known
        return known[1]

    def train(self, mode: bool = True) -> Any:
        """As every module's `train`; does nothing where nothing would change."""
        modules: list[Any] = _modules(self)
        settled = (not mode) not in map(attrgetter("training"), modules)
        kinds: set[Any] = set(map(type, modules[1:]))
        if settled and not modules[0].use_kernels and all(kind.train in _plain() for kind in kinds):
            return self
        return super().train(mode)  # type: ignore[misc]


@cache
def _plain() -> tuple[Any, ...]:
    """What doesn't matter where the mode stays; the second chooses kernels anew, if the model uses some."""
    from transformers import PreTrainedModel

    return nn.Module.train, PreTrainedModel.train


def _count(modules: list[nn.Module], only_trainable: bool, exclude_embeddings: bool) -> int:
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


def _values(module: Any) -> int:
    values: int = module.packed_values
    return values


def _modules(model: Any) -> list[nn.Module]:
    """Every module once, the model first; walked through anew where one of them has other children than it had."""
    below, children = model.__dict__.get("_known_modules", ((), None))
    modules = [model, *below]
    if _values_of("_modules", modules) == children:
        return modules
    modules = _walk(model)
    children = _values_of("_modules", modules)
    model.__dict__["_known_modules"] = modules[1:], children  # without itself: the last reference to a model frees it
    return modules


def _values_of(dictionary: str, modules: Iterable[nn.Module]) -> list[Any]:
    """All values of a dictionary that every module has, without a line of Python for each."""
    return list(chain.from_iterable(map(dict.values, map(attrgetter(dictionary), modules))))


def _walk(model: nn.Module) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting.extend(module._modules.values())
    return list(found.values())
