import peft
import pytest
import torch
from runtime.artifacts import tiny_llama

from surogate_load import load_model

QUESTIONS = [
    {},
    {"only_trainable": True},
    {"exclude_embeddings": True},
    {"only_trainable": True, "exclude_embeddings": True},
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "fp8-tensor"])
def test_counts_what_the_dense_model_has(artifact, kind, tied):
    changes = {"tie_word_embeddings": tied}
    dense, packed = tiny_llama(**changes), load_model(artifact(kind, **changes))
    dense.requires_grad_(False)
    settings = peft.LoraConfig(r=4, target_modules="all-linear")
    for _ in ("without", "with an adapter"):
        for question in QUESTIONS:
            assert packed.num_parameters(**question) == dense.num_parameters(**question), question
        dense, packed = (peft.get_peft_model(model, settings) for model in (dense, packed))


class Counting(torch.nn.Module):
    calls = 0

    def train(self, mode=True):
        self.calls += 1
        return super().train(mode)


def test_train_reaches_whatever_would_change(artifact):
    model = load_model(artifact("nf4"))
    inner = model.model.layers[1].mlp.down_proj
    for mode in (True, False):
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}
        inner.training = not mode
        model.train(mode)
        assert inner.training is mode
    model.watched = Counting()
    model.eval()
    assert model.watched.calls == 1, "a module with a train of its own is always asked"
    assert model.train() is model
