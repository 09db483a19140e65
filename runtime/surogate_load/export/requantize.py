"""An artifact and an adapter as one artifact: merged dense, packed again as it was, and what that lost beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from torch import Tensor

from surogate_formats.artifact import Artifact
from surogate_formats.checkpoint import Checkpoint
from surogate_formats.codes_in_words import codes_in_words
from surogate_formats.dtypes import FLOATS
from surogate_formats.errors import UsageError
from surogate_formats.manifest import Manifest
from surogate_load.artifact_weights import OpenArtifact
from surogate_load.errors import ExportFailedError, QuantizerFailedError
from surogate_load.export.checkpoint import check_absent
from surogate_load.export.merging import merge
from surogate_load.export.recorded_options import (
    CalibrationTextGoneError,
    code_arguments,
    quantizer_arguments,
    training_settings,
)
from surogate_load.local import open_local
from surogate_load.quantized_cache import _run
from surogate_load.weight import to_torch


class UnrecordedOptionsError(UsageError):
    """An artifact that others packed is to be packed again as it was, and no manifest says how that was."""


@dataclass(frozen=True)
class Requantized:
    """What merging and packing again came to. Errors and sizes are Frobenius norms over several weights together.

    Attributes:
        out: directory of the new artifact.
        weights: how many weights were packed.
        adapted: how many of them the adapter changed.
        change: ||merged - before|| / ||before|| of these; None if there are none.
        relative_error: ||packed - merged|| / ||merged|| of these; None if there are none.
        largest_error: the largest relative error of a weight, adapted or not.
        codes: how they were chosen, in words.
        against: dtypes of the merged weights that errors are relative to: the float32 sums, rounded once.
    """

    out: Path
    weights: int
    adapted: int
    change: float | None
    relative_error: float | None
    largest_error: float
    codes: str
    against: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """A line where packing again lost more than the adapter changed."""
        if not self.change or self.relative_error is None or self.relative_error <= self.change:
            return None
        return (
            f"{self.out}: packing again lost {self.relative_error / self.change:.2f} times what the adapter changed: "
            "the artifact and the adapter apart, or the dense merge (without --requantize), are nearer to what was "
            "trained"
        )

    def lines(self) -> dict[str, str]:
        """In words by title."""
        found = {
            "artifact": str(self.out),
            "packed again": f"{self.weights} weights, the largest relative error of one {self.largest_error:.5f}",
            "codes": self.codes,
            "errors are": f"against the merged weights in {' and '.join(self.against)}",
        }
        if self.change is None or self.relative_error is None:
            return {**found, "adapter": "changed none of them"}
        ratio = self.relative_error / self.change if self.change else float("inf")
        found["adapter"] = (
            f"changed {self.adapted} of them by {self.change:.5f}; packing them again cost {self.relative_error:.5f}, "
            f"{ratio:.2f} times that"
        )
        return found


@dataclass
class _Change:
    """Sums up, in float64, how an adapter changes packed weights."""

    weights: OpenArtifact
    names: list[str] = field(default_factory=list)
    change: float = 0.0
    before: float = 0.0

    def __call__(self, name: str, merged: Tensor) -> None:
        module = name.removesuffix(".weight")
        if module in self.weights and module != name:
            before = self.weights[module].dequantize()
            self.names.append(name)
            self.change += _square(merged - before)
            self.before += _square(before)


def merge_requantized(
    artifact: str | Path,
    adapter: str | Path,
    out: str | Path,
    dtype: str | None = None,
    *,
    codes: str | None = None,
    calibration_text: str | Path | None = None,
) -> Requantized:
    """Merges an adapter as `merge` does, and packs the result with the format, layout and options of the artifact.

    The dense checkpoint stands in a temporary folder beside `out` meanwhile. Its dtype is that of the source, since the
    artifact records it and keeps what isn't packed in it: packing from float32 sums instead would lower the errors by
    0.02 % in NF4 and 0.15 % in FP8.

    Codes that were calibrated are calibrated again, on the merged model, which takes as long as the first time. An
    adapter that came with the artifact isn't made again.

    Args:
        artifact: directory of an artifact that surogate-quantize made.
        adapter: directory that `PeftModel.save_pretrained` wrote.
        out: a directory that doesn't exist yet.
        dtype: of the source that is packed again, and so of what stays unquantized; as in `dequantize`.
        codes: nearest, search or calibrated; None chooses them as the artifact's were chosen.
        calibration_text: a file to calibrate on; None lets the merged model write the text.

    Raises:
        CalibrationTextGoneError: the artifact was calibrated on a file, and neither `codes` nor a text is given.
        UnrecordedOptionsError: others packed it.
        QuantizerFailedError: the quantizer can't pack the merged model.
        Everything that `merge` raises.
    """
    target = Path(out)
    check_absent(target)
    with open_local(artifact) as opened:
        manifest = _manifest(opened)
        words = [*quantizer_arguments(manifest), *_codes(opened, codes, calibration_text)]
        change = _Change(OpenArtifact(opened))
        with _beside(target) as folder:
            dense = folder / f"{Path(manifest.source).name or 'model'}-merged"
            merge(artifact, adapter, dense, dtype, watch=change)
            _quantize(dense, target, words, manifest, folder / "recipe.yaml")
            return _measure(dense, target, change)


def _manifest(artifact: Artifact) -> Manifest:
    if artifact.foreign is not None:
        raise UnrecordedOptionsError(
            f"{artifact.path}: has no surogate.json, so the options that packed it are unknown; leave --requantize "
            "out, then surogate-quantize packs the dense checkpoint"
        )
    return artifact.manifest


def _codes(artifact: Artifact, codes: str | None, text: str | Path | None) -> list[str]:
    try:
        return code_arguments(artifact.manifest, codes, text)
    except CalibrationTextGoneError as error:
        raise CalibrationTextGoneError(f"{artifact.path}: {error}") from None


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is gone afterwards."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix=f"{out.name}.merging-", dir=out.parent)
    except OSError as error:
        raise ExportFailedError(f"{out}: can't be written ({error.strerror or error}); choose another place") from error
    with folder as name:
        yield Path(name)


def _quantize(dense: Path, out: Path, options: list[str], manifest: Manifest, settings: Path) -> None:
    """Runs the quantizer as a process of its own: its memory goes with it."""
    settings.write_text(yaml.safe_dump(training_settings(manifest)), "utf-8")
    words = ["--config", str(settings), *options, "--out", str(out), "--quiet"]
    code, reason = _run([sys.executable, "-m", "surogate_quantize", str(dense), *words])
    if code:
        raise QuantizerFailedError(f"{out}: the merged model can't be packed again: {reason}")


def _measure(dense: Path, out: Path, change: _Change) -> Requantized:
    with Artifact.open(out) as packed, Checkpoint.open(dense) as merged:
        records, how = packed.manifest.tensors, codes_in_words(packed.manifest.options)
        errors = {f"{module}.weight": records[f"{module}.weight"].relative_error or 0.0 for module in packed.modules}
        adapted = [name for name in change.names if name in errors]
        squares = {name: _square(to_torch(merged.read(name)).float()) for name in adapted}
        dtypes = {merged.entry(name).info.dtype for name in errors}
    total = sum(squares.values())
    lost = sum(squares[name] * errors[name] ** 2 for name in adapted)
    return Requantized(
        out=out,
        weights=len(errors),
        adapted=len(adapted),
        change=(change.change / change.before) ** 0.5 if change.before else None,
        relative_error=(lost / total) ** 0.5 if total else None,
        largest_error=max(errors.values(), default=0.0),
        codes=how,
        against=tuple(sorted(name for name, dtype in FLOATS.items() if dtype in dtypes)),
    )


def _square(values: Tensor) -> float:
    """The sum of squares, in float64."""
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64)) ** 2
