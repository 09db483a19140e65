"""Layout `surogate`: NF4 with the specification's double quantization; read by surogate_load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from surogate_formats.checkpoint.errors import shown
from surogate_formats.errors import UsageError
from surogate_formats.format import Format, Shape, to_dict
from surogate_formats.layouts.layout import Config, UnreadableConfigError, expect, module_names
from surogate_formats.nf4 import NF4
from surogate_formats.registry import make_format

VERSION = 1

METHOD = "surogate-quant"
"""The `quant_method` of config.json: readers that don't know it print it, and it names the package to install."""

METHODS = (METHOD, "surogate")
"""All that are read: what was written, and what older versions wrote."""

_OWN_KEYS = ("quant_method", "format", "layout_version", "modules_to_not_convert")


class SurogateLayout:
    """Companions stand beside the weight under its name: `P.weight`, `P.weight_absmax`, ...

    Underscores, since the name of a torch parameter can't hold a dot.
    """

    name: ClassVar[str] = "surogate"
    suffixes: ClassVar[dict[str, dict[str, str]]] = {
        "nf4": {
            "codes": "weight",
            "absmax": "weight_absmax",
            "absmax_scale": "weight_absmax_scale",
            "absmax_offset": "weight_absmax_offset",
        }
    }

    fixed: ClassVar[dict[str, dict[str, Any]]] = {}
    expert_warnings: ClassVar[dict[str, str]] = {}
    splits_experts: ClassVar[bool] = True
    dtype_warnings: ClassVar[dict[str, str]] = {}
    way_out: ClassVar[dict[str, str]] = {}
    reader_warnings: ClassVar[dict[str, str]] = {}

    def refusal(self, fmt: Format) -> str | None:
        """Double quantization as bitsandbytes does it has a place among its own names only."""
        if not isinstance(fmt, NF4):
            return f"it doesn't store {fmt.name}"
        if fmt.double_quant == "dynamic":
            return "dynamic double quantization is bitsandbytes': use `layout='bitsandbytes'`"
        return None

    def keep_reason(self, fmt: Format, shape: Shape) -> str | None:
        """No shape is a problem to our own reader."""
        return None

    def quantization_config(self, fmt: Format, kept: Sequence[str]) -> Config:
        """`quant_method: surogate-quant`, the format's parameters, and what was kept."""
        parameters: dict[str, Any] = to_dict(fmt)
        return {
            "quant_method": METHOD,
            "format": parameters.pop("name"),
            "layout_version": VERSION,
            **parameters,
            "modules_to_not_convert": list(kept),
        }

    def parse_config(self, config: Config) -> tuple[Format, list[str]]:
        """Reads what `quantization_config` wrote, of this version."""
        expect(config, "layout_version", VERSION)
        name = expect(config, "format", *self.suffixes)
        parameters = {key: value for key, value in config.items() if key not in _OWN_KEYS}
        kept = module_names(config, "modules_to_not_convert")
        try:
            return make_format(name, parameters), kept
        except UsageError as error:
            raise UnreadableConfigError(f"quantization_config: {shown(error)}") from error
