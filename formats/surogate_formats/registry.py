"""The table of formats. A new format is one module and one row here."""

from __future__ import annotations

from typing import Any

from surogate_formats.errors import UsageError
from surogate_formats.format import Format, from_parameters
from surogate_formats.fp8 import FP8
from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4

FORMATS: dict[str, type[NF4] | type[NVFP4] | type[FP8]] = {cls.name: cls for cls in (NF4, NVFP4, FP8)}
"""Format classes by the name that `--format` takes."""


def make_format(name: str, parameters: dict[str, Any]) -> Format:
    """The format of that name with these parameters; unknown names and parameters are a `UsageError`."""
    if name not in FORMATS:
        raise UsageError(f"no format {name!r}; choose one of {', '.join(FORMATS)}")
    return from_parameters(FORMATS[name], parameters)


def from_dict(data: dict[str, Any]) -> Format:
    """The inverse of `surogate_formats.format.to_dict`."""
    parameters = dict(data)
    return make_format(parameters.pop("name"), parameters)
