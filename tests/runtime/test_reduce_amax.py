"""reduce_amax on two gloo ranks: one all-reduce for all layers, and every rank ends with the same scales."""

import tempfile

import torch
from runtime.ranks import LAYERS, worker


def test_two_ranks(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (f"{folder}/rendezvous", str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first["reduced"] == second["reduced"] == [2 * LAYERS]
    assert first[True].numel() == 2 * LAYERS
    assert torch.equal(first[True], second[True])
    assert not torch.equal(first[False], second[False])
    assert first[True][0].item() == second[True][0].item() == second[False][0].item() == 448 / 4
    assert first[False][0].item() == 448
