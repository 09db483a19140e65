"""Has FSDP2 of torch 2.11 take parameters of integers, as that of later versions does."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from surogate_load.import_hooks import when_imported

TAKES_INTEGERS = (2, 12)
"""torch from which FSDP2 asks no gradient of integers as it makes its parameters, and casts none by a policy."""

_HOME = "torch.distributed.fsdp._fully_shard._fsdp_param"


def register() -> None:
    """Changes, before torch 2.12, what FSDP2 does with integer parameters, once it is imported; later, nothing."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < TAKES_INTEGERS:
        when_imported(_HOME, _change)


def _change() -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    let_take_integers(_fsdp_param)


def let_take_integers(home: Any) -> None:
    """Brings two lines of torch 2.12 into the module that has `FSDPParam` of 2.11.

    Both concern integer parameters alone, which FSDP2 refuses there with a RuntimeError: `_init_sharded_param` makes
    them without a gradient, and `init_dtype_attrs` has `MixedPrecisionPolicy.param_dtype` pass them over.

    Args:
        home: `torch.distributed.fsdp._fully_shard._fsdp_param`.
    """
    home.nn = _Nn(nn.__name__)
    home.FSDPParam.init_dtype_attrs = _casting_no_integers(home.FSDPParam.init_dtype_attrs)


class _Nn(ModuleType):
    """Stands for `torch.nn` in FSDP2's module, which wants of each parameter a gradient that it then takes back."""

    def __getattr__(self, name: str) -> Any:
        return _parameter if name == "Parameter" else getattr(nn, name)


def _parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=requires_grad and (data.is_floating_point() or data.is_complex()))


def _casting_no_integers(original: Any) -> Any:
    def init_dtype_attrs(self: Any, mp_policy: Any) -> None:
        floating = self.sharded_param.is_floating_point()
        original(self, mp_policy if floating else replace(mp_policy, param_dtype=None))

    return init_dtype_attrs
