"""FP8 on a GPU: the kernels' bytes are those of plain torch, and tensor cores agree with the emulation."""

import peft
import pytest
import torch
from runtime.layers import KINDS, make_layer

from surogate_formats.recipe import Recipe
from surogate_load import MicroStep, load_model, set_recipe
from surogate_load.kernels import load_kernels
from surogate_load.ops.library import PLAIN
from surogate_load.recipes.delayed import delayed_scales

pytestmark = pytest.mark.gpu

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SPECIAL = torch.tensor([0.0, -0.0, 1e-38, 3e-42, 448.0, 464.0, 57344.0, 61440.0, 1e30, -(2.0**-9), 2.0**-10, 2.0**-16])


def hard(shape, dtype):
    torch.manual_seed(shape[-1])
    x = torch.randn(shape, device="cuda") * torch.exp(4 * torch.randn(shape, device="cuda"))
    flat = x.view(-1)
    special = SPECIAL.to("cuda")[: flat.numel()]
    flat[: special.numel()] = special
    return x.to(dtype)


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("result", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (64, 96), (257, 1000), (4096, 1024)])
@pytest.mark.parametrize("scale", [0.0, 0.37, 2.0**-40])
@pytest.mark.parametrize(("by_column", "copies"), [(False, 1), (True, 1), (False, 700)])
def test_bytes_are_those_of_plain_torch(source, result, shape, scale, by_column, copies):
    assert load_kernels("cuda")
    x = hard(shape, source)
    if source == torch.float16:
        x = x.nan_to_num(0.0, 60000.0, -60000.0)
    column = torch.rand(shape[-1], device="cuda") if by_column else None
    given = torch.full((1,), scale, device="cuda")
    results = []
    for run in (PLAIN["quantize_fp8"], torch.ops.surogate.quantize_fp8):
        current = torch.full((1,), 0.5, device="cuda")
        results.append((*run(x, column, given, current, True, 1, result, copies), current))
    for wanted, found in zip(*results, strict=True):
        assert torch.equal(as_bytes(wanted), as_bytes(found))


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_what_is_not_finite(value, scale):
    x = torch.ones(40, 48, device="cuda")
    x[:] = 0 if value == 0 else x
    x[3, 5] = value
    given, results = torch.full((1,), scale, device="cuda"), []
    for run in (PLAIN["quantize_fp8"], torch.ops.surogate.quantize_fp8):
        current = torch.zeros(1, device="cuda")
        results.append((*run(x, None, given, current, True, 0, E4M3), current))
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(wanted.float(), found.float(), rtol=0, atol=0, equal_nan=True)


def test_nothing_is_recorded_unless_asked():
    current = torch.zeros(1, device="cuda")
    torch.ops.surogate.quantize_fp8(hard((8, 64), torch.bfloat16), None, torch.ones(1).cuda(), current, False, 0, E4M3)
    assert current == 0


@pytest.mark.parametrize("shape", [(4, 4), (128, 128), (132, 260), (1024, 4096), (12288, 4096), (6, 8)])
def test_transpose(shape):
    x = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda").view(E4M3)
    found = torch.ops.surogate.transpose_bytes(x)
    assert torch.equal(as_bytes(found), x.view(torch.uint8).t().contiguous())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp8-block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_agree_with_the_emulation(kind, dtype):
    results = []
    for emulate in (True, False):
        layer, _ = make_layer(kind, (256, 128), dtype=dtype)
        model = torch.nn.Sequential(layer).cuda().train()
        set_recipe(model, Recipe("fp8-hybrid"), emulate=emulate)
        torch.manual_seed(0)
        x = torch.randn(2, 40, 128, device="cuda", dtype=dtype, requires_grad=True)
        y = model(x)
        (y.float() * torch.randn_like(y).float()).sum().backward()
        results.append((y.detach().float(), x.grad.float(), *(s.current for s in delayed_scales(model))))
    for wanted, found in zip(*results, strict=True):
        assert (wanted - found).norm() <= 4e-3 * wanted.norm()


def adapted(path, emulate, **arguments):
    model = load_model(path, recipe="fp8-hybrid", device="cuda", emulate=emulate, **arguments)
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return peft.get_peft_model(model, settings, autocast_adapter_dtype=False).train()


@pytest.mark.parametrize(("kind", "unused"), [("nf4", 3), ("fp8-tensor", 1)])
def test_captured_steps_follow_the_emulation(artifact, kind, unused):
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
        # The first layer's input needs no gradient, so q, k and v there never quantize one; fused, they have one scale
        # (of NF4 they are too small to be fused).
        assert sum(not scale.scale.item() for scale in delayed_scales(model)) == unused
        ends.append(losses)
    assert ends[1] == pytest.approx(ends[0], abs=0.03)
