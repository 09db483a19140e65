"""Solved weights on disk until the artifact's shards are written, a file a block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from surogate_formats.dtypes import NUMPY
from surogate_formats.format import Format, Parts, TensorSpec
from surogate_quantize.bands import Band
from surogate_quantize.calibration.adapter import Factors
from surogate_quantize.calibration.saving import save
from surogate_quantize.calibration.weight_pass import SolvedBlock
from surogate_quantize.syncing import replace_synced, sync_file

_SEPARATOR, _ERRORS, _STARVED, _DIGEST = "|", "errors", "starved", "sha256"


class SolvedBlocks:
    """The parts of solved weights, by block.

    Args:
        folder: where the files are.
        fmt: the format of all weights.

    Attributes:
        errors, starved: of all blocks, see `SolvedBlock`.
    """

    def __init__(self, folder: Path, fmt: Format) -> None:
        """Reads nothing yet."""
        self._folder, self._format = folder, fmt
        self._blocks: dict[str, int] = {}
        self.errors: dict[str, tuple[float, float]] = {}
        self.starved: dict[str, int] = {}

    def put(self, index: int, solved: SolvedBlock) -> None:
        """Writes what was found for a block, so that it survives."""
        path = self._path(index)
        part = path.with_suffix(".part")
        # Bytes: safetensors' numpy side has no name for E4M3.
        tensors = {
            f"{module}{_SEPARATOR}{key}": np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for module, parts in solved.parts.items()
            for key, array in parts.items()
        }
        for module, (a, b) in solved.updates.items():
            tensors |= {f"{module}{_SEPARATOR}lora_A": a.cpu().numpy(), f"{module}{_SEPARATOR}lora_B": b.cpu().numpy()}
        told = {_ERRORS: json.dumps(solved.errors, allow_nan=False), _STARVED: json.dumps(solved.starved)}
        told[_DIGEST] = _digest(tensors)
        save(save_file, tensors, part, told)
        sync_file(part)
        replace_synced(part, path)
        self._take(index)

    def has(self, index: int) -> bool:
        """Whether a block's file is there, with the bytes that were written."""
        try:
            self._take(index)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return False
        return True

    def _take(self, index: int) -> None:
        with safe_open(self._path(index), "np") as file:
            told = file.metadata() or {}
            if told[_DIGEST] != _digest({name: file.get_tensor(name) for name in file.keys()}):  # noqa: SIM118
                raise ValueError("damaged")
            for module, (before, after) in json.loads(told[_ERRORS]).items():
                self._blocks[module] = index
                self.errors[module] = (before, after)
            self.starved.update(json.loads(told[_STARVED]))

    def parts(self, band: Band) -> Parts:
        """The parts of a band of a solved weight."""
        module, whole = band.tensor.module, self._format.part_specs(band.tensor.info.shape)
        before = self._format.part_specs((band.start, *band.tensor.info.shape[1:])) if band.start else {}
        found: Parts = {}
        with safe_open(self._path(self._blocks[module]), "np") as file:
            for key, spec in self._format.part_specs(band.shape).items():
                stored = file.get_slice(f"{module}{_SEPARATOR}{key}")
                grows = spec != whole[key]
                start = before[key].nbytes if grows and before else 0
                found[key] = _shaped(stored[start : start + spec.nbytes], spec)
        return found

    def updates(self) -> dict[str, Factors]:
        """The updates of all weights that have one, by module."""
        found: dict[str, Factors] = {}
        for module, index in self._blocks.items():
            with safe_open(self._path(index), "pt") as file:
                names = [f"{module}{_SEPARATOR}lora_{letter}" for letter in "AB"]
                if names[0] in file.keys():  # noqa: SIM118
                    a, b = map(file.get_tensor, names)
                    found[module] = (a, b)
        return found

    def _path(self, index: int) -> Path:
        return self._folder / f"block-{index:05d}.safetensors"


def _shaped(data: NDArray[np.uint8], spec: TensorSpec) -> NDArray[np.generic]:
    return np.ascontiguousarray(data).view(NUMPY[spec.dtype]).reshape(spec.shape)


def _digest(tensors: Mapping[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
