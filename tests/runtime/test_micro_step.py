"""MicroStep where no graph can be made: the same numbers as a plain loop, and a word about why."""

import logging

import peft
import pytest
import torch
import transformers
from torch import nn

import surogate_load
from surogate_formats.errors import UsageError
from surogate_formats.recipe import Recipe
from surogate_load import MicroStep, load_model
from surogate_load.errors import NoLayersError
from surogate_load.step.capturable import why_eager
from surogate_load.step.checkpointing import without_random_state
from surogate_load.step.regional import compile_layers, decoder_layers
from surogate_load.step.survey import Survey

IDS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def adapted(path, **arguments):
    torch.manual_seed(1)
    model = load_model(path, **arguments)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")).train()


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_on_a_cpu_it_is_a_plain_step(artifact, caplog):
    model = adapted(artifact("nf4"))
    for _ in range(2):
        (model(input_ids=IDS, labels=IDS).loss / 2).backward()
    expected = gradients(model)
    model.zero_grad()
    step = MicroStep(model)
    with caplog.at_level(logging.WARNING):
        losses = [step(input_ids=IDS, labels=IDS, gradient_scale=0.5) for _ in range(2)]
    assert torch.equal(*losses)
    assert not losses[0].requires_grad
    torch.testing.assert_close(gradients(model), expected)
    assert caplog.text.count("MicroStep runs eagerly: the model is on cpu") == 1


def test_a_mask_of_ones_is_dropped(artifact, monkeypatch):
    model = adapted(artifact("nf4"))
    seen = []
    base = model.get_base_model()
    monkeypatch.setattr(base.model, "forward", _spy(base.model.forward, seen))
    step = MicroStep(model)
    ones = torch.ones_like(IDS)
    padded = ones.clone()
    padded[0, :4] = 0
    for mask in (ones, padded):
        step(input_ids=IDS, labels=IDS, attention_mask=mask)
    assert seen[0] is None
    assert torch.equal(seen[1], padded)


def _spy(forward, seen):
    def spying(*args, **kwargs):
        seen.append(kwargs.get("attention_mask"))
        return forward(*args, **kwargs)

    return spying


def _checkpointed(model, dropout=0.0, use_reentrant=False):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout


def test_plain_checkpointing_is_captured_without_its_random_state(artifact, monkeypatch):
    model = adapted(artifact("nf4"))
    _checkpointed(model)
    functions = [layer._gradient_checkpointing_func for layer in model.get_base_model().model.layers]
    with without_random_state(model), monkeypatch.context() as patch:
        patch.setattr(torch, "get_rng_state", lambda: pytest.fail("the random state was read"))
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert [layer._gradient_checkpointing_func for layer in model.get_base_model().model.layers] == functions
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert why_eager(Survey(model), {"input_ids": IDS, "labels": IDS}) is None


@pytest.mark.parametrize(
    ("change", "batch", "reason"),
    [
        (lambda m: m, {}, "without labels"),
        (lambda m: m, {"labels": IDS, "position_ids": IDS}, "position_ids"),
        (lambda m: m.eval(), {"labels": IDS}, "not being trained"),
        (lambda m: m, {"labels": IDS, "images": [IDS]}, "plain values"),
        (lambda m: _checkpointed(m, dropout=0.1), {"labels": IDS}, "checkpointing with dropout"),
        (lambda m: _checkpointed(m, use_reentrant=True), {"labels": IDS}, "another way"),
    ],
)
def test_what_a_graph_cannot_hold_is_named(artifact, monkeypatch, change, batch, reason):
    model = adapted(artifact("nf4"))
    change(model)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert reason in why_eager(Survey(model), {"input_ids": IDS, **batch})


def test_compile_layers_compiles_each_decoder_layer(artifact):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = adapted(artifact("nf4"))
    model = adapted(artifact("nf4"))
    compile_layers(model.get_base_model(), backend="aot_eager")
    assert len(list(decoder_layers(model.get_base_model()))) == 2
    lengths = torch.randint(5, 200, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    for number, length in enumerate([24, 24, *lengths]):
        ids = torch.randint(0, 64, (2, length))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if number < 8:
            expected = plain(input_ids=ids, labels=ids).loss
            expected.backward()
            torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    # The first layer's input needs no gradient, the others' does; each once for one length and once for any.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("recipe", ["bf16", "fp8-hybrid"])
def test_compiled_layers_under_checkpointing(artifact, recipe):
    results = []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        model = adapted(artifact("nf4"), recipe=recipe, emulate=True, dtype=torch.float32)
        compile_layers(model.get_base_model(), backend="aot_eager")
        if checkpointed:
            _checkpointed(model)
        layer = next(decoder_layers(model.get_base_model()))
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
        assert layer.gradient_checkpointing is checkpointed
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_activation_memory_is_a_share(artifact, share):
    with pytest.raises(UsageError, match="activation_memory"):
        load_model(artifact("nf4"), compile="layers", activation_memory=share)


def test_compile_is_a_keyword_of_load_model(artifact):
    model = load_model(artifact("nf4"), compile="layers")
    assert all(layer._compiled_call_impl is not None for layer in decoder_layers(model))
    with pytest.raises(surogate_load.load_model.__globals__["UsageError"], match="neither 'layers' nor None"):
        load_model(artifact("nf4"), compile="everything")
    with pytest.raises(NoLayersError, match="Linear has no decoder layers"):
        compile_layers(nn.Linear(2, 2))


def test_captured_trainer_trains_as_the_trainer(artifact, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    ends = []
    for kind in (transformers.Trainer, surogate_load.captured(transformers.Trainer)):
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            seed=3,
        )
        trainer = kind(model=adapted(artifact("nf4")), args=settings, train_dataset=rows)
        ends.append((trainer.train().training_loss, [p for p in trainer.model.parameters() if p.requires_grad]))
    assert ends[0][0] == pytest.approx(ends[1][0])
    torch.testing.assert_close(ends[0][1], ends[1][1])
    assert type(trainer).__name__ == "CapturedTrainer"


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.eval(),
        lambda model: model.base_model.model.model.layers[0].self_attn.eval(),
        lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.scaling.update(default=99.0),
        lambda model: model.gradient_checkpointing_enable(),
        lambda model: model.disable_adapter_layers(),
        lambda model: surogate_load.set_recipe(model, Recipe("fp8-hybrid"), emulate=True),
    ],
    ids=["eval", "eval of a layer", "scaling", "checkpointing", "disabled", "recipe"],
)
def test_what_a_captured_step_no_longer_fits(artifact, change):
    model = adapted(artifact("nf4"))
    survey = Survey(model)
    captured_for = survey.state()
    assert survey.state() == captured_for
    change(model)
    assert survey.state() != captured_for


def test_loading_a_state_leaves_fused_weights_where_they_are(artifact):
    """A captured graph knows their addresses."""
    model = adapted(artifact("nf4", num_key_value_heads=4))
    fused = model.get_base_model().model.layers[0].self_attn.fused_q_proj.parts
    before = [part.data_ptr() for part in fused]
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model))
    assert [part.data_ptr() for part in model.get_base_model().model.layers[0].self_attn.fused_q_proj.parts] == before
