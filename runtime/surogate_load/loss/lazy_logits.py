"""A model's output whose logits are computed when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

_MAKE = "make_logits"


def with_lazy_logits(output: ModelOutput, make: Callable[[], Tensor]) -> ModelOutput:
    """The output without its logits; `make` computes them, [B, T, V]."""
    entries = {name: value for name, value in output.items() if name != "logits"}
    lazy: ModelOutput = _lazy_class(type(output))(**entries, make_logits=make)  # type: ignore[arg-type]
    return lazy


@cache
def _lazy_class(base: type) -> type:
    made: Any = dataclass(type(base.__name__, (_LazyLogits, base), {"__module__": base.__module__}))
    plain = made.__init__

    def init(self: Any, *args: Any, make_logits: Callable[[], Tensor] | None = None, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if make_logits is not None:
            self[_MAKE] = make_logits  # an entry, since accelerate, DDP and FSDP2 make a new output of the entries

    made.__init__ = init
    return made  # type: ignore[no-any-return]


class _LazyLogits:
    """What an output's class is mixed with."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name != "logits" or value is not None:
            return value
        made: Tensor = super().__getattribute__(_MAKE)()
        self[name] = made
        return made

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            return self.logits
        if isinstance(key, str) or key == 0:
            return super().__getitem__(key)  # type: ignore[misc]
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)[key]
