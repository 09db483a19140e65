"""Two gloo ranks under DDP: one rank's training with the same global batch, without a packed byte on the wire."""

import tempfile

import pytest
import torch
from runtime.lora_steps import losses_of_four_steps
from runtime.ranks import adapted, ddp_worker

IDS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "recipe"), [("nf4", "bf16"), ("fp8-tensor", "fp8-hybrid"), ("nf4", "fp8-hybrid")])
def test_two_ranks_train_as_one(artifact, tmp_path, kind, recipe):
    path = artifact(kind, num_key_value_heads=4)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/rendezvous", str(tmp_path), path, recipe, IDS)
        torch.multiprocessing.spawn(ddp_worker, arguments, nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for name, parameter in first["trained"].items():
        assert torch.equal(parameter, second["trained"][name]), name
    assert all(torch.equal(*pair) for pair in zip(first["scales"], second["scales"], strict=True))
    one = adapted(path, recipe)
    losses = losses_of_four_steps(one, IDS)
    both = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    tolerance = 1e-5 if recipe == "bf16" else 2e-2  # dy of half a batch is another number of fp8 steps
    assert both == pytest.approx(losses, rel=tolerance)
    assert not [name for name in first["synced"] if "recipe" in name or "fused" in name]
    assert not [name for name in first["synced"] if name.endswith(("weight_absmax", "_proj.base_layer.weight"))]
