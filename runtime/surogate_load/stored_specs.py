"""What the files hold of one packed weight, checked against what a model needs."""

from __future__ import annotations

from collections.abc import Mapping

from surogate_formats.checkpoint import TensorInfo
from surogate_formats.format import Format, TensorSpec
from surogate_formats.layouts import Layout, stored_tensors
from surogate_formats.packed_weights import ACTIVATION_SCALES, fits
from surogate_load.errors import MismatchedModelError
from surogate_load.recoding import must_restore
from surogate_load.weight import TORCH_DTYPES, WeightKind


def stored_specs(
    layout: Layout, module: str, kind: WeightKind, infos: Mapping[str, TensorInfo], stored: Format
) -> dict[str, TensorSpec] | None:
    """The packed tensors of a module as the files hold them: the parts, then what stands beside them.

    Args:
        layout: names them.
        module: its name on disk.
        kind: what the model needs.
        infos: every tensor of the files.
        stored: the format in which they hold it.

    Returns:
        The ending of each tensor's name to dtype and shape; None where the layer holds restored parts instead.

    Raises:
        MismatchedModelError: a part is missing, or is another weight's.
    """
    if must_restore(layout, kind.format):
        for tensor in stored_tensors(layout, stored, module, kind.shape).values():
            _check(tensor.name, infos.get(tensor.name), tensor.spec)
        return None
    suffixes = layout.suffixes[kind.format.name]
    specs = {}
    for part, spec in kind.specs.items():
        name = f"{module}.{suffixes[part]}"
        found = _check(name, infos.get(name), spec)
        specs[suffixes[part]] = TensorSpec(found.dtype, found.shape)
    for suffix in sorted({*suffixes.values(), *ACTIVATION_SCALES} - specs.keys()):
        beside = infos.get(f"{module}.{suffix}")
        if beside is not None and beside.dtype in TORCH_DTYPES:  # else it is passed over
            specs[suffix] = TensorSpec(beside.dtype, beside.shape)
    return specs


def _check(name: str, found: TensorInfo | None, spec: TensorSpec) -> TensorInfo:
    if found is None or not fits(found, spec):
        has = f"is {found.dtype} {list(found.shape)}" if found else "is missing"
        needs = f"{spec.dtype} {list(spec.shape)}"
        raise MismatchedModelError(f"{name} {has}, the model needs {needs}; quantize again")
    return found
