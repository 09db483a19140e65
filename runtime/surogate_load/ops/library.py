"""The operator library `surogate`: one place where schema, fake and plain-torch kernel of an op are registered.

The plain kernels are registered as `CompositeExplicitAutograd`: they serve every device, until a kernel registered for
`CUDA` takes precedence there. None is differentiable; the autograd functions of the recipes call them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("surogate", "DEF")  # type: ignore[no-untyped-call]

PLAIN: dict[str, Callable[..., Any]] = {}
"""Op name to its implementation in plain torch."""


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op.

    Args:
        schema: name, arguments and results, as `name(Tensor x) -> Tensor`; mutated arguments are marked `Tensor(a!)`.
        kernel: the implementation in plain torch.
        fake: the same without computing: results of the right shape, dtype and device.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    PLAIN[name] = kernel
    torch.library.register_fake(f"surogate::{name}", fake, lib=LIBRARY)


def accelerate(name: str, kernel: Callable[..., Any]) -> None:
    """Registers what computes an op on CUDA tensors instead of its plain-torch kernel."""
    LIBRARY.impl(name, kernel, "CUDA")  # type: ignore[no-untyped-call]
