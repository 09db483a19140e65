"""What an adapter has learned since the one that an artifact came with, as an adapter for the dense model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from surogate_formats.artifact import ADAPTER, Artifact
from surogate_load.errors import UnreadableAdapterError
from surogate_load.export.checkpoint import whole_directory
from surogate_load.local import open_local
from surogate_load.lora_factors import PREFIX, WEIGHTS, LoraFactors, read_factors
from surogate_load.saved_adapter import check_saved


def export_adapter(artifact: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Writes an adapter for the dense source that adds what training has changed: s_t B_t A_t - s_0 B_0 A_0.

    The adapter that `surogate-quantize --adapter-init` writes makes up for the error of the packed weights, which the
    dense ones haven't. The difference is [s_t B_t, -s_0 B_0] [A_t; A_0]: as many ranks as both have together.

    Args:
        artifact: directory of the artifact, or its name on the Hub; with its initial adapter.
        adapter: directory that PEFT saved: the initial adapter, trained.
        out: a directory that doesn't exist yet.

    Returns:
        `out`.

    Raises:
        UnreadableAdapterError: there is no initial adapter, it isn't the artifact's any more, or the other one can't
            have started from it.
        NotPlainAdapterError: an adapter is more than products that are added to linears.
        ExportExistsError, ExportFailedError: see `export.checkpoint.whole_directory`.
    """
    check_saved(adapter)
    with open_local(artifact) as opened:
        folder = _initial(opened)
        first, last = read_factors(folder), read_factors(adapter)
        if lost := next((module for module in first if module not in last), None):
            raise UnreadableAdapterError(f"{adapter}: has nothing for {lost}, so it didn't start from {folder}")
        changes = {module: _change(module, last[module], first.get(module), adapter) for module in last}
        with whole_directory(Path(out)) as directory:
            _write(directory, changes, opened.manifest.source, opened.manifest.revision)
    return Path(out)


def _initial(artifact: Artifact) -> Path:
    folder = artifact.path / ADAPTER
    if not (folder / WEIGHTS).is_file():
        raise UnreadableAdapterError(
            f"{artifact.path}: came with no adapter ({ADAPTER}), so one that was trained on it is one for the dense "
            "model as it stands"
        )
    recorded = artifact.manifest.sidecars.get(f"{ADAPTER}/{WEIGHTS}")
    if recorded is not None and hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() != recorded:
        raise UnreadableAdapterError(
            f"{folder}: isn't the adapter that the artifact came with any more; quantize again, and save another "
            "adapter somewhere else"
        )
    return folder


def _change(module: str, last: LoraFactors, first: LoraFactors | None, adapter: str | Path) -> LoraFactors:
    """The difference with the scale of the last: where both have one, no value of a matrix is changed."""
    if first is None:
        return last
    if first.a.shape[1] != last.a.shape[1] or first.b.shape[0] != last.b.shape[0]:
        raise UnreadableAdapterError(f"{adapter}: is for another {module}, so it didn't start from the initial adapter")
    b = torch.cat([last.b, first.b * -(first.scale / last.scale)], 1)
    return LoraFactors(torch.cat([last.a, first.a]), b, last.scale)


def _write(directory: Path, changes: dict[str, LoraFactors], source: str, revision: str | None) -> None:
    from peft import LoraConfig

    rank = max(len(change.a) for change in changes.values())
    scale = next(iter(changes.values())).scale
    tensors: dict[str, Tensor] = {}
    for module, change in changes.items():
        lacking = rank - len(change.a)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pad(change.a, (0, 0, 0, lacking)).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = pad(change.b * (change.scale / scale), (0, lacking)).contiguous()
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    alpha = scale * rank
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=sorted(changes),
        base_model_name_or_path=source,
        revision=revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
