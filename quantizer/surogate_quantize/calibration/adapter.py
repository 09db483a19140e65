"""The adapter that starts from what is left of the error: a LoRA adapter in PEFT's format, beside the artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from surogate_quantize.calibration.saving import save
from surogate_quantize.syncing import sync_file, write_synced

ALPHA = 2
"""lora_alpha over the rank."""

FULL_SVD = 2048
"""Sides up to here get the whole singular value decomposition; larger ones a randomised one (arXiv:0909.4061)."""

OVERSAMPLING, ITERATIONS = 16, 6

Factors = tuple[Tensor, Tensor]
"""A float32 [rank, K] and B float32 [N, rank] of an update B A."""


def factors(missing: Tensor, hessian: Tensor, rank: int) -> Factors:
    """The update B A of a rank that is nearest to what is missing, in the norm of the inputs: tr(E H E^T).

    With H = L L^T it is the truncated singular value decomposition of `missing` L, times L^-1 (Eckart and Young, 1936).

    Args:
        missing: float32 [N, K], the target less the quantized weight.
        hessian: float64 [K, K], damped.
        rank: of the update.
    """
    lower = torch.linalg.cholesky(hessian).float()
    weighted = missing @ lower
    rank = min(rank, *weighted.shape)
    if min(weighted.shape) <= FULL_SVD:
        left, sizes, right = torch.linalg.svd(weighted, full_matrices=False)
        right = right.T
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            left, sizes, right = torch.svd_lowrank(weighted, rank + OVERSAMPLING, ITERATIONS)
    root = sizes[:rank].sqrt()
    a = torch.linalg.solve_triangular(lower.T, right[:, :rank] * root, upper=True).T
    return a.contiguous(), (left[:, :rank] * root).contiguous()


def write_adapter(folder: Path, update: Mapping[str, Factors], rank: int, alpha: float, base: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: is made.
        update: A and B by module.
        rank: the adapter's.
        alpha: PEFT multiplies B A by alpha / rank, so B is divided by that.
        base: what the adapter belongs to.
    """
    folder.mkdir()
    tensors = {}
    for module, (a, b) in update.items():
        lacking = rank - len(a)  # a weight may be narrower than the rank
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, lacking))
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.nn.functional.pad(b * (rank / alpha), (0, lacking))
    path = folder / "adapter_model.safetensors"
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save(save_file, stored, path, {"format": "pt"})
    sync_file(path)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(update),
        "inference_mode": True,
    }
    write_synced(folder / "adapter_config.json", json.dumps(config, indent=2).encode() + b"\n")
