"""On a GPU the solver's loops over columns are replayed: to the bit what they give when they are called."""

from functools import partial

import pytest
import torch

from surogate_formats.nf4 import NF4
from surogate_formats.nvfp4 import NVFP4
from surogate_quantize.calibration import solver
from surogate_quantize.calibration.grids import make_grid
from surogate_quantize.calibration.replayed import Replayed

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("fmt", [NF4(), NVFP4(two_d=False)], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("function", [solver._rounded_chunk, solver._descend_codes])
def test_replayed_is_called(fmt, function):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    grid = make_grid(fmt, fmt.quantize(weight.numpy()), weight.cuda())
    called, replayed = partial(function, grid), Replayed(partial(function, grid))
    scale = grid.blocks.expand(grid.scales).T
    for seed in range(4):
        generator = torch.Generator("cuda").manual_seed(seed)
        random = [torch.randn(128, 96, device="cuda", generator=generator) for _ in range(2)]
        inner = torch.randn(128, 128, device="cuda", generator=generator)
        inner.diagonal().abs_().add_(1)
        given = (random[0], scale, inner) if function is solver._rounded_chunk else (random[0], scale, random[1], inner)
        expected = called(*given)
        for found, wanted in zip(replayed(*given), expected, strict=True):
            assert torch.equal(found, wanted), seed
