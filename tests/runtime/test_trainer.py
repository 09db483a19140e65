"""transformers' Trainer and friends on packed models, as their users call them."""

import logging

import peft
import pytest
import torch
import transformers

from surogate_load import captured, load_model, load_scaling_state, save_scaling_state, set_recipe
from surogate_load.errors import UnreadableStateError
from surogate_load.linear import QuantizedLinear
from surogate_load.recipes.delayed import delayed_scales
from surogate_load.recipes.state_file import STATE_NAME

ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0)).tolist()
]


def adapted(path, **arguments):
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    return peft.get_peft_model(load_model(path, **arguments), peft.LoraConfig(**settings))


def trainer(model, folder, kind=transformers.Trainer, **settings):
    chosen = {
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "seed": 5,
        "use_cpu": True,
        **settings,
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **chosen)
    return kind(model=model, args=args, train_dataset=ROWS)


def state_of(model):
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    scales = [tensor for scale in delayed_scales(model) for tensor in (scale.history, scale.scale)]
    return trained, scales


@pytest.mark.parametrize(
    ("kind", "recipe"), [("nf4", "bf16"), ("fp8-tensor", "fp8-hybrid"), ("nf4", "fp8-hybrid"), ("fp4", "nvfp4")]
)
def test_a_resumed_run_ends_as_the_undisturbed_one(artifact, tmp_path, kind, recipe):
    arguments = {"dtype": torch.float32, "recipe": recipe, "emulate": True}
    whole = trainer(adapted(artifact(kind), **arguments), tmp_path / "whole")
    whole.train()
    rest = trainer(adapted(artifact(kind), **arguments), tmp_path / "rest")
    rest.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert (tmp_path / "whole/checkpoint-3" / STATE_NAME).is_file() == (recipe != "bf16")
    expected, expected_scales = state_of(whole.model)
    found, scales = state_of(rest.model)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert len(scales) == len(expected_scales)
    assert all(torch.equal(*pair) for pair in zip(scales, expected_scales, strict=True))


def test_a_checkpoint_without_scales_is_said(artifact, tmp_path, caplog):
    arguments = {"dtype": torch.float32, "recipe": "fp8-hybrid", "emulate": True}
    first = trainer(adapted(artifact("nf4"), **arguments), tmp_path)
    first.train()
    (tmp_path / "checkpoint-3" / STATE_NAME).unlink()
    with caplog.at_level(logging.WARNING):
        trainer(adapted(artifact("nf4"), **arguments), tmp_path).train(str(tmp_path / "checkpoint-3"))
    assert "start anew" in caplog.text


def test_scaling_state_of_another_model_or_recipe(artifact, tmp_path):
    model = load_model(artifact("nf4"), recipe="fp8-hybrid", emulate=True)
    assert save_scaling_state(model, tmp_path) == tmp_path / STATE_NAME
    assert load_scaling_state(model, tmp_path)
    other = load_model(artifact("nf4"))
    with pytest.raises(UnreadableStateError, match="another model or recipe"):
        load_scaling_state(other, tmp_path)
    assert save_scaling_state(other, tmp_path / "nowhere") is None
    (tmp_path / STATE_NAME).write_bytes(b"garbage")
    with pytest.raises(UnreadableStateError, match="can't be read"):
        load_scaling_state(model, tmp_path)


def test_captured_trainer_trains_alike(artifact, tmp_path):
    losses = []
    for kind in (transformers.Trainer, captured(transformers.Trainer)):
        run = trainer(adapted(artifact("nf4"), dtype=torch.float32), tmp_path / kind.__name__, kind)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_prepare_model_for_kbit_training(artifact):
    model = load_model(artifact("nf4"))
    packed = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")).train()
    ids = torch.tensor([row["input_ids"] for row in ROWS[:2]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)
    kept = dict(model.get_base_model().named_parameters())
    for name, before in packed.items():
        found = kept.get(name, kept.get(name.replace("_proj.", "_proj.base_layer.")))
        assert torch.equal(found, before), name


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_maps(artifact, device_map):
    model = transformers.AutoModelForCausalLM.from_pretrained(artifact("nf4"), device_map=device_map)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", ["nf4", "fp4", "fp8-channel"])
def test_generate_with_padding_on_the_left_and_an_adapter(artifact, kind):
    """Each row of a padded batch says what it says alone; the cache changes nothing; the adapter changes something."""
    model = adapted(artifact(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    rows = [ROWS[0]["input_ids"][:5], ROWS[1]["input_ids"][:9]]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 63}
    alone = [
        model.generate(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **settings)
        for row in rows
    ]
    padded = torch.tensor([[0] * (9 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (9 - len(row)) + [1] * len(row) for row in rows])
    together = model.generate(input_ids=padded, attention_mask=mask, **settings)[:, 9:].tolist()
    uncached = model.generate(input_ids=padded, attention_mask=mask, use_cache=False, **settings)[:, 9:].tolist()
    assert together == uncached
    for row, single, batched in zip(rows, alone, together, strict=True):
        said = single[0, len(row) :].tolist()
        assert batched[: len(said)] == said
    with model.disable_adapter():
        plain = model.generate(input_ids=padded, attention_mask=mask, **settings)[:, 9:].tolist()
    assert plain != together


def test_several_adapters_and_rslora(artifact):
    model = adapted(artifact("nf4"), dtype=torch.float32).eval()
    model.add_adapter(
        "other", peft.LoraConfig(r=2, target_modules=["v_proj"], use_rslora=True, init_lora_weights=False)
    )
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        first = model(ids).logits
        model.set_adapter("other")
        second = model(ids).logits
        model.set_adapter("default")
        assert torch.equal(model(ids).logits, first)
    assert not torch.equal(first, second)


def test_set_recipe_under_an_adapter_keeps_training(artifact):
    from surogate_formats.recipe import Recipe

    model = adapted(artifact("fp8-tensor"), dtype=torch.float32).train()
    set_recipe(model, Recipe("fp8-hybrid"), emulate=True)
    ids = torch.tensor([ROWS[0]["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(scale.current > 0 for scale in delayed_scales(model)[2:])
