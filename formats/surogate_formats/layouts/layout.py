"""What a layout is: how a format's parts are named on disk and declared in config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from surogate_formats.errors import ArtifactError, UsageError
from surogate_formats.format import Format, Parts, Shape, TensorSpec

Config = dict[str, Any]


class UnreadableConfigError(ArtifactError):
    """A `quantization_config` declares something that we can't read."""


class LayoutRefusesError(UsageError):
    """A layout can't store the format with these parameters, or its readers would take it wrongly."""


class Layout(Protocol):
    """Names, shapes and declaration of a format on disk; pure functions, no state."""

    name: ClassVar[str]
    suffixes: ClassVar[dict[str, dict[str, str]]]
    """Format name to part name to the ending of its tensor's name."""

    fixed: ClassVar[dict[str, dict[str, Any]]]
    """Format name to the parameters that the layout's readers need, unless the user sets others."""

    expert_warnings: ClassVar[dict[str, str]]
    """Format name to what its readers get wrong about mixture-of-experts weights."""

    dtype_warnings: ClassVar[dict[str, str]]
    """Format name to what its readers get wrong about models that aren't in bfloat16."""

    way_out: ClassVar[dict[str, str]]
    """Format name to what takes weights of the shapes that `keep_reason` refuses."""

    def refusal(self, fmt: Format) -> str | None:
        """Why the format with its parameters has no place in this layout; None if it has."""
        ...

    def keep_reason(self, fmt: Format, shape: Shape) -> str | None:
        """Why a weight of this shape must stay unquantized for the layout's readers; None if it need not."""
        ...

    def quantization_config(self, fmt: Format, kept: Sequence[str]) -> Config:
        """The entry `quantization_config` of config.json; `kept` are full module names."""
        ...

    def parse_config(self, config: Config) -> tuple[Format, list[str]]:
        """The format that a `quantization_config` declares and the modules it leaves alone.

        Raises:
            UnreadableConfigError: the config declares something that this layout doesn't hold.
        """
        ...


@dataclass(frozen=True)
class StoredTensor:
    """Where a part stands on disk."""

    name: str
    spec: TensorSpec


def stored_tensors(layout: Layout, fmt: Format, module: str, shape: Shape) -> dict[str, StoredTensor]:
    """Part name to stored tensor for the weight [N, K] of `module` (full name without `.weight`)."""
    suffixes = layout.suffixes[fmt.name]
    return {part: StoredTensor(f"{module}.{suffixes[part]}", spec) for part, spec in fmt.part_specs(shape).items()}


def pack(layout: Layout, fmt: Format, module: str, parts: Parts) -> Parts:
    """Parts by their names on disk."""
    suffixes = layout.suffixes[fmt.name]
    return {f"{module}.{suffixes[part]}": array for part, array in parts.items()}


def unpack(layout: Layout, fmt: Format, module: str, tensors: Parts, shape: Shape) -> Parts:
    """The inverse of `pack`: takes the module's tensors out of `tensors` (which may hold others).

    Raises:
        ArtifactError: a part is missing, or has another dtype or shape than the format gives it.
    """
    parts: Parts = {}
    for part, stored in stored_tensors(layout, fmt, module, shape).items():
        array = tensors.get(stored.name)
        if array is None:
            raise ArtifactError(f"{stored.name} is missing: {module} can't be dequantized without it")
        check_stored(stored, array)
        parts[part] = array
    return parts


def check_stored(stored: StoredTensor, array: Any) -> None:
    """Raises `ArtifactError` if a numpy array isn't what the format stores under this name."""
    from surogate_formats.dtypes import NAMES

    found = TensorSpec(NAMES[array.dtype], tuple(array.shape))
    if found != stored.spec:
        raise ArtifactError(
            f"{stored.name} is {found.dtype} {list(found.shape)}, "
            f"expected {stored.spec.dtype} {list(stored.spec.shape)}"
        )


def expect(config: Config, key: str, *allowed: object) -> Any:
    """The config's value of `key`, if it is one of those allowed; else `UnreadableConfigError`."""
    value = config.get(key)
    if value not in allowed:
        wanted = " or ".join(map(repr, allowed))
        raise UnreadableConfigError(f"quantization_config: {key} is {value!r}, expected {wanted}")
    return value


def module_names(config: Config, key: str) -> list[str]:
    """The list of module names under `key`; a missing one is empty, anything but strings unreadable."""
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnreadableConfigError(f"quantization_config: {key} is not a list of module names")
    return names
