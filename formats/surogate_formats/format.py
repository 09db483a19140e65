"""What a format is: a frozen set of parameters that says how a weight becomes parts, and parts a weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from surogate_formats.dtypes import BITS
from surogate_formats.errors import NonFiniteWeightError, UsageError

Parts = dict[str, NDArray[Any]]
"""A quantized weight: part name (`codes`, `scale`, ...) to array, in the dtypes and shapes of `Format.part_specs`."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """The safetensors dtype name and the shape of a stored tensor."""

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's payload."""
        return int(np.prod(self.shape, dtype=np.int64)) * BITS[self.dtype] // 8


@runtime_checkable
class Format(Protocol):
    """The numbers of a quantized weight W [N, K] = [out_features, in_features], row-major.

    Implementations are frozen dataclasses of their parameters. The numpy code in them is the definition of the format:
    every faster path is byte-equal to it.
    """

    name: ClassVar[str]

    @property
    def shares_amax(self) -> bool:
        """Whether the members of a fused group are quantized with the largest magnitude of the whole group."""
        ...

    def keep_reason(self, shape: Shape) -> str | None:
        """Why a weight of this shape can't take the format; None if it can."""
        ...

    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        """Dtype and shape of every part of a weight of this shape."""
        ...

    def band_rows(self, shape: Shape) -> int:
        """Rows of which a weight may be cut into bands of multiples: the bands' parts then follow each other."""
        ...

    def quantize(self, weight: NDArray[np.float32], amax: np.float32 | None = None, *, search: bool = False) -> Parts:
        """Quantizes float32 [N, K]; `amax` is the fused group's largest magnitude where `shares_amax`.

        With `search` each block takes, of the legal scales that are tried, the first one with the least squared error
        (`surogate_formats.search`). The parts mean the same, whichever way they were chosen.
        """
        ...

    def dequantize(self, parts: Parts, shape: Shape) -> NDArray[np.float32]:
        """The float32 [N, K] values that the parts stand for."""
        ...


F = TypeVar("F", bound="Format")


def to_dict(fmt: Format) -> dict[str, Any]:
    """The format as JSON-ready data: its name and every parameter."""
    return {"name": fmt.name, **asdict(fmt)}  # type: ignore[call-overload]


def from_parameters(cls: type[F], parameters: dict[str, Any]) -> F:
    """Builds a format from JSON data; a parameter that the format doesn't have is a `UsageError`."""
    known = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
    for key, value in parameters.items():
        if key not in known:
            names = ", ".join(f"`{name}`" for name in known)
            raise UsageError(f"{cls.name} has no parameter `{key:.80}`; it has {names}")
        check_type(cls.name, key, value, known[key])
    return cls(**parameters)


def check_type(name: str, parameter: str, value: object, default: object) -> None:
    """Raises `UsageError` unless the parameter's value is of its default's type: 64.0 isn't 64 here, nor 1 True."""
    if type(value) is not type(default):
        raise UsageError(f"{name}: `{parameter}` is {value!r:.80}; give a {type(default).__name__}")


def check_choice(name: str, parameter: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises `UsageError` unless the parameter's value is one of the format's choices."""
    if value not in choices:
        allowed = ", ".join(map(str, choices))
        raise UsageError(f"{name}: `{parameter}` is {value!r:.80}; choose one of {allowed}")


def largest_magnitude(weight: NDArray[np.float32]) -> np.float32:
    """The largest |x| of a weight, 0 if it is empty.

    Raises:
        NonFiniteWeightError: a NaN or an infinity is in the weight; the message gives its first index.
    """
    finite = np.isfinite(weight)
    if not finite.all():
        index = np.unravel_index(int(np.argmin(finite)), weight.shape)
        place = ", ".join(str(int(i)) for i in index)
        raise NonFiniteWeightError(f"[{place}] is {weight[index]}")
    return np.float32(np.max(np.abs(weight), initial=0))
