"""NVFP4 on a GPU of compute capability 10.0 or more: tensor cores agree with the emulation."""

import peft
import pytest
import torch
from runtime.layers import make_layer

from surogate_formats.recipe import Recipe
from surogate_load import MicroStep, load_model, set_recipe
from surogate_load.recipes.noise import Noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (10, 0),
        reason="FP4 tensor cores come with compute capability 10.0",
    ),
]

KINDS = ("fp4", "fp4-1d", "fp8-tensor", "fp8-channel")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-3, torch.float16: 4e-3}


def same_noise(model):
    for index, noise in enumerate(module for module in model.modules() if isinstance(module, Noise)):
        noise.seed.fill_(index)
        noise.offset.zero_()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "tokens"), [((256, 128), (2, 40)), ((96, 160), (1,)), ((32, 32), (129,)), ((2048, 1024), (4, 512))]
)
def test_tensor_cores_agree_with_the_emulation(kind, dtype, shape, tokens):
    results = []
    for emulate in (True, False):
        layer, _ = make_layer(kind, shape, dtype=dtype)
        model = torch.nn.Sequential(layer).cuda().train()
        set_recipe(model, Recipe("nvfp4"), emulate=emulate)
        same_noise(model)
        torch.manual_seed(0)
        x = torch.randn(*tokens, shape[1], device="cuda", dtype=dtype, requires_grad=True)
        y = model(x)
        (y.float() * torch.randn_like(y).float()).sum().backward()
        results.append((y.detach().float(), x.grad.float()))
    for wanted, found in zip(*results, strict=True):
        assert (wanted - found).norm() <= TOLERANCE[dtype] * wanted.norm()


def adapted(path, emulate, **arguments):
    model = load_model(path, recipe="nvfp4", device="cuda", emulate=emulate, **arguments)
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return peft.get_peft_model(model, settings, autocast_adapter_dtype=False).train()


@pytest.mark.parametrize("kind", ["fp4", "fp8-tensor"])
def test_captured_steps_follow_the_emulation(artifact, kind):
    ids, ends = torch.randint(0, 64, (2, 64), device="cuda"), []
    for emulate in (True, False):
        model = adapted(artifact(kind), emulate, compile=None if emulate else "layers")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        step, losses = MicroStep(model), []
        for _ in range(8):
            loss = model(input_ids=ids, labels=ids).loss if emulate else step(input_ids=ids, labels=ids)
            if emulate:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        ends.append(losses)
    assert ends[1] == pytest.approx(ends[0], abs=0.05)
