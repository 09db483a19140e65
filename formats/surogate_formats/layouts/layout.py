"""What a layout is: how a format's parts are named on disk and declared in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

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
    """Format name to part name to the ending of its tensor's name (of each stored tensor, in a `RecodingLayout`)."""

    fixed: ClassVar[dict[str, dict[str, Any]]]
    """Format name to the parameters that the layout's readers need, unless the user sets others."""

    expert_warnings: ClassVar[dict[str, str]]
    """Format name to what its readers get wrong about mixture-of-experts weights."""

    splits_experts: ClassVar[bool]
    """Whether experts stand by themselves even of a model whose readers know them fused only, but for surogate_load."""

    dtype_warnings: ClassVar[dict[str, str]]
    """Format name to what its readers get wrong about models that aren't in bfloat16."""

    reader_warnings: ClassVar[dict[str, str]]
    """Format name to what its readers get wrong, or guess, whatever the model."""

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


@runtime_checkable
class RecodingLayout(Protocol):
    """A layout that stores something else than the format's parts as they are: constants, another shape, a reciprocal.

    Layouts without these methods store each part under its own name. Shapes and dtypes of what is stored follow from
    the weight's shape alone: files are laid out before a value is known.
    """

    def stored_specs(self, fmt: Format, shape: Shape) -> dict[str, TensorSpec]:
        """Dtype and shape of every stored tensor, by the keys of `Layout.suffixes`."""
        ...

    def store(self, fmt: Format, parts: Parts, shape: Shape, dtype: str) -> Parts:
        """The stored arrays of a weight whose source is of a safetensors dtype.

        The parts may be those of a band of its rows; arrays that grow with the rows are then the band's.
        """
        ...

    def restore(self, fmt: Format, stored: Parts, shape: Shape) -> Parts:
        """The inverse of `store`; `ArtifactError` if the arrays are none that it gives."""
        ...


@runtime_checkable
class DescribingLayout(Layout, RecodingLayout, Protocol):
    """A layout that stores beside each weight what it is, since no header tells."""

    def describe(self, specs: Mapping[str, TensorSpec], quant_state: bytes) -> tuple[Format, Shape, str]:
        """Format, shape [N, K] and source dtype of a weight, by its stored tensors and the bytes that say so.

        Raises:
            ArtifactError: it is none that this layout stores; the message says what differs.
        """
        ...

    def check_map(self, key: str, values: NDArray[np.float32]) -> None:
        """Raises `ArtifactError` where a stored table of codes is none that the layout stores."""
        ...


@runtime_checkable
class SidecarLayout(Protocol):
    """A layout whose readers want files of their own beside config.json."""

    def sidecars(self, config: Config) -> dict[str, Config]:
        """Name to JSON content of each such file; `config` is the `quantization_config`."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """Where a part stands on disk."""

    name: str
    spec: TensorSpec


def stored_tensors(layout: Layout, fmt: Format, module: str, shape: Shape) -> dict[str, StoredTensor]:
    """Part name to stored tensor for the weight [N, K] of `module` (full name without `.weight`)."""
    suffixes = layout.suffixes[fmt.name]
    specs = layout.stored_specs(fmt, shape) if isinstance(layout, RecodingLayout) else fmt.part_specs(shape)
    return {part: StoredTensor(f"{module}.{suffixes[part]}", spec) for part, spec in specs.items()}


def stored_arrays(layout: Layout, fmt: Format, parts: Parts, shape: Shape, dtype: str) -> Parts:
    """The arrays of `stored_tensors`, by the same keys, for a weight whose source is of a safetensors dtype."""
    return layout.store(fmt, parts, shape, dtype) if isinstance(layout, RecodingLayout) else parts


def pack(layout: Layout, fmt: Format, module: str, parts: Parts, shape: Shape, dtype: str = "BF16") -> Parts:
    """Parts by their names on disk."""
    suffixes = layout.suffixes[fmt.name]
    stored = stored_arrays(layout, fmt, parts, shape, dtype)
    return {f"{module}.{suffixes[part]}": array for part, array in stored.items()}


def unpack(layout: Layout, fmt: Format, module: str, tensors: Parts, shape: Shape) -> Parts:
    """The inverse of `pack`: takes the module's tensors out of `tensors` (which may hold others).

    Raises:
        ArtifactError: a part is missing, has another dtype or shape than the format gives it, or isn't what the layout
            stores.
    """
    found: Parts = {}
    for part, stored in stored_tensors(layout, fmt, module, shape).items():
        array = tensors.get(stored.name)
        if array is None:
            raise ArtifactError(f"{stored.name} is missing: {module} can't be dequantized without it")
        check_stored(stored, array)
        found[part] = array
    if not isinstance(layout, RecodingLayout):
        return found
    try:
        return layout.restore(fmt, found, shape)
    except ArtifactError as error:
        raise ArtifactError(f"{module}: {error}") from error


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
    if not any(_is_same(value, choice) for choice in allowed):
        wanted = " or ".join(map(repr, allowed))
        raise UnreadableConfigError(f"quantization_config: {key} is {value!r:.80}, expected {wanted}")
    return value


def _is_same(value: object, choice: object) -> bool:
    """Equal, and of one type: to Python, 1 and 1.0 are True."""
    if isinstance(value, list) and isinstance(choice, list):
        return len(value) == len(choice) and all(map(_is_same, value, choice))
    return type(value) is type(choice) and value == choice


def module_names(config: Config, key: str) -> list[str]:
    """The list of module names under `key`; a missing one is empty, anything but strings unreadable."""
    names = config.get(key)
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnreadableConfigError(f"quantization_config: {key} is not a list of module names")
    return names
