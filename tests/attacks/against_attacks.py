"""Artifacts that are right in themselves, and aren't of the source that they are compared with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from attacks.artifact_attacks import NAN, put
from attacks.attack import Attack
from attacks.models import Model, dense, ours

from surogate_formats.checkpoint.errors import NoWeightsError, TruncatedFileError
from surogate_formats.errors import SurogateError
from surogate_load.verification import DifferentSourceError, NotTheSourceError


def compared(
    error: type[SurogateError],
    edit_source: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None,
    edit: Callable[[Model], object] = lambda model: None,
    after: Callable[[Path], object] = lambda source: None,
    names: str = "m.up.weight",
) -> Attack:
    def make(directory: Path) -> None:
        model, tensors = ours("fp8"), dense()
        for record in model.manifest["tensors"].values():
            record["relative_error"] = None  # else it would be found first
        edit(model)
        model.rehash()
        edit_source(tensors)
        model.write(directory)
        (directory / "source").mkdir()
        Model(tensors, {}, None).write(directory / "source")
        after(directory / "source")

    return Attack(make, "verify --against", error, names)


def other_error(model: Model) -> None:
    model.manifest["tensors"]["m.up.weight"]["relative_error"] = 0.2


AGAINST_ATTACKS: dict[str, Attack] = {
    "code NaN, whose error is no number": compared(DifferentSourceError, edit=put("m.up.weight", NAN)),
    "scale NaN, whose error is no number": compared(DifferentSourceError, edit=put("m.up.weight_scale", np.nan)),
    "error of another weight": compared(DifferentSourceError, edit=other_error),
    "source's value NaN": compared(DifferentSourceError, lambda tensors: tensors["m.up.weight"].fill(np.nan)),
    "source's kept tensor is another": compared(
        DifferentSourceError, lambda tensors: tensors["m.norm.weight"].fill(2), names="m.norm.weight"
    ),
    "source lacks a tensor": compared(NotTheSourceError, lambda tensors: tensors.pop("m.up.weight")),
    "source's tensor of another shape": compared(
        NotTheSourceError, lambda tensors: tensors.update({"m.up.weight": np.ones((2, 2), np.float32)})
    ),
    "source cut": compared(
        TruncatedFileError,
        after=lambda source: (source / "model.safetensors").write_bytes(
            (source / "model.safetensors").read_bytes()[:-1]
        ),
        names="model.safetensors",
    ),
    "source of no weights": compared(
        NoWeightsError, after=lambda source: (source / "model.safetensors").unlink(), names="source"
    ),
}
