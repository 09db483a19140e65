"""A packed model between devices: `.to("cuda")` and `device="cuda"` give the same model, and it can be saved there."""

import pytest
import torch
from safetensors.torch import load_file

from surogate_load import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

IDS = torch.arange(12).reshape(1, 12)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "fp8-channel"])
def test_moving_is_loading_there(artifact, kind, tmp_path):
    loaded = load_model(artifact(kind), device_map="cuda")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cuda"}
    moved = load_model(artifact(kind)).to("cuda")
    with torch.no_grad():
        expected = loaded(IDS.cuda()).logits
        assert torch.equal(moved(IDS.cuda()).logits, expected)
        back = moved.to("cpu")
        torch.testing.assert_close(back(IDS).logits, expected.cpu(), rtol=0.05, atol=0.05)
    loaded.save_pretrained(tmp_path)
    found, stored = load_file(tmp_path / "model.safetensors"), load_file(artifact(kind) / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in stored)


def test_scaling_state_moves_along(artifact):
    model = load_model(artifact("fp8-tensor"), recipe="fp8-hybrid", emulate=True).to("cuda").train()
    embedded = model.get_input_embeddings()(IDS.cuda()).requires_grad_()
    model(inputs_embeds=embedded).logits.float().sum().backward()
    assert model.model.layers[0].mlp.up_proj.recipe.input.current.item() > 0
