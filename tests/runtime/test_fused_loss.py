"""The loss in chunks: transformers' own numbers for every kind of head, and the plain path where it must be taken."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from torch import nn

from surogate_load.loss import linear_cross_entropy as module
from surogate_load.loss.fused_head import FusedHead, fuse_head
from surogate_load.loss.linear_cross_entropy import LogitTransform, linear_cross_entropy
from surogate_load.quick_walks import QuickWalks

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "Llama": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Gemma": {},
    "Gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 4.0},
}
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 97, (2, 20), generator=GENERATOR)
LABELS = IDS.clone()
LABELS[0, :5] = -100


def make_model(name="Llama", **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **ARCHITECTURES[name], **settings})
    model = getattr(transformers, f"{name}ForCausalLM")(config).train()
    model.lm_head.requires_grad_(False)
    if not config.tie_word_embeddings:
        nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


def gradients(model, **arguments):
    """The loss, and the gradients of all that trains."""
    model.zero_grad()
    loss = model(input_ids=IDS, **arguments).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("arguments", [{}, {"num_items_in_batch": torch.tensor(11)}, {"num_items_in_batch": 7}])
def test_loss_and_gradients_are_those_of_transformers(monkeypatch, name, arguments):
    monkeypatch.setattr(module, "CHUNK", 7)
    model = make_model(name)
    fused = copy.deepcopy(model)
    fuse_head(fused)
    expected, wanted = gradients(model, labels=LABELS, **arguments)
    found, got = gradients(fused, labels=LABELS, **arguments)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert "logits" not in fused(input_ids=IDS, labels=LABELS)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Granite"])
def test_logits_come_on_access(name):
    model = make_model(name)
    fuse_head(model)
    plain = model.eval()(input_ids=IDS, labels=LABELS)
    lazy = model.train()(input_ids=IDS, labels=LABELS)
    assert "logits" not in lazy
    torch.testing.assert_close(lazy.logits, plain.logits)
    assert lazy.logits is lazy["logits"] is lazy[1]
    assert lazy[0] is lazy.loss
    again = type(lazy)(dict(model(input_ids=IDS, labels=LABELS).items()))  # what accelerate does to outputs
    torch.testing.assert_close(again.logits, plain.logits)


def test_shifted_labels_and_all_ignored():
    model = make_model()
    fused = copy.deepcopy(model)
    fuse_head(fused)
    shifted = nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:]
    a, _ = gradients(model, labels=LABELS)
    b, _ = gradients(fused, labels=LABELS, shift_labels=shifted)
    torch.testing.assert_close(a, b)
    none, grads = gradients(fused, labels=torch.full_like(IDS, -100), num_items_in_batch=3)
    assert none == 0
    assert not any(g.any() for g in grads)


def test_mixed_precision_like_autocast():
    model = make_model()
    fused = copy.deepcopy(model)
    fuse_head(fused)
    with torch.autocast("cpu", torch.bfloat16):
        expected, wanted = gradients(model, labels=LABELS)
        found, got = gradients(fused, labels=LABELS)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got, wanted, rtol=5e-2, atol=2e-3)


def _train_head(model):
    model.lm_head.requires_grad_(True)


def _listen_to_head(model):
    model.lm_head.register_forward_hook(lambda *_: None)


def _own_loss(model):
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.float().mean()


@pytest.mark.parametrize("change", [_train_head, _listen_to_head, _own_loss, nn.Module.eval])
def test_plain_path_where_more_than_the_loss_is_wanted(change):
    model = make_model()
    fuse_head(model)
    change(model)
    output = model(input_ids=IDS, labels=LABELS)
    assert "logits" in output


class OddLlama(transformers.LlamaForCausalLM):
    """Does to its logits what nobody has heard of."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state).sin()
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_unknown_change_of_logits_is_noticed(caplog):
    model = make_model()
    model.__class__ = OddLlama
    expected, wanted = gradients(model, labels=LABELS)
    fuse_head(model)
    for _ in range(2):
        found, got = gradients(model, labels=LABELS)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(got, wanted)
    assert caplog.text.count("OddLlama changes its logits") == 1


def test_same_name_signature_and_copies():
    model = make_model()
    plain = type(model)
    fuse_head(model)
    fuse_head(model)
    assert type(model).__name__ == plain.__name__
    assert type(model).__bases__ == (FusedHead, QuickWalks, plain)
    assert inspect.signature(model.forward) == inspect.signature(plain(model.config).forward)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert copied(input_ids=IDS, labels=LABELS).loss == model(input_ids=IDS, labels=LABELS).loss


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5), LogitTransform(2.0, 3.0)])
def test_gradient_is_the_derivative(transform):
    hidden = torch.randn(9, 8, generator=GENERATOR, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 8, generator=GENERATOR, dtype=torch.float64)
    labels = torch.randint(0, 13, (9,), generator=GENERATOR)
    labels[3] = -100
    linear_cross_entropy(hidden, weight, labels, transform=transform).backward()
    found, hidden.grad = hidden.grad, None
    values = transform.apply((hidden @ weight.t()).float())
    nn.functional.cross_entropy(values, labels).backward()
    torch.testing.assert_close(found, hidden.grad, rtol=1e-5, atol=1e-7)
