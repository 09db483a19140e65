"""MicroStep on a GPU: a replayed graph gives the losses and gradients of the same compiled code, bit for bit."""

import peft
import pytest
import torch
import transformers
from runtime.layers import KINDS

import surogate_load
from surogate_load import MicroStep, load_model
from surogate_load.recipes.delayed import delayed_scales

pytestmark = pytest.mark.gpu

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = (
    [torch.randint(0, 64, (2, 64), generator=GENERATOR).cuda() for _ in range(4)] if torch.cuda.is_available() else []
)


def adapted(path, recipe="bf16", **arguments):
    model = load_model(path, recipe=recipe, emulate=True, device="cuda", **arguments)
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, settings, autocast_adapter_dtype=False).train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "compile_", "checkpointed"),
    [*((kind, way, False) for kind in KINDS for way in (None, "layers")), ("nf4", None, True), ("nf4", "layers", True)],
)
def test_replay_equals_eager(artifact, kind, compile_, checkpointed):
    torch._dynamo.reset()
    model = adapted(artifact(kind), compile=compile_)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step = MicroStep(model)
    step(input_ids=BATCHES[0], labels=BATCHES[0])  # with the attention kernel that the graph takes
    model.zero_grad()
    for rounds in range(2):  # set_to_none in between
        losses = [step(input_ids=ids, labels=ids, gradient_scale=0.5) for ids in BATCHES[:2]]
        found = gradients(model)
        model.zero_grad(set_to_none=True)
        with surogate_load.step.attention.fastest_attention():
            expected = [model(input_ids=ids, labels=ids).loss for ids in BATCHES[:2]]
            for loss in expected:
                (loss * 0.5).backward()
        assert losses == [loss.detach() for loss in expected], rounds
        wanted = gradients(model)
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert torch.equal(found[name], wanted[name]), name
        model.zero_grad(set_to_none=True)


def test_capturing_changes_nothing(artifact):
    model = adapted(artifact("nf4"), "fp8-hybrid")
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.25)
    before = [scale.current.clone() for scale in delayed_scales(model)]
    random = torch.cuda.get_rng_state()
    step = MicroStep(model)
    given = {"input_ids": BATCHES[0], "labels": BATCHES[0], "gradient_scale": torch.ones((), device="cuda")}
    step._captured(given, step._surveyed())
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert all(torch.equal(scale.current, old) for scale, old in zip(delayed_scales(model), before, strict=True))
    assert all((gradient == 0.25).all() for gradient in gradients(model).values())


def test_trains_as_eager_steps_do(artifact):
    ends = []
    for captured in (False, True):
        model = adapted(artifact("nf4"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        step = MicroStep(model)
        losses = []
        with surogate_load.step.attention.fastest_attention():
            for number in range(25):
                ids = BATCHES[number % 2]
                loss = step(input_ids=ids, labels=ids) if captured else model(input_ids=ids, labels=ids).loss
                if not captured:
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        ends.append(losses)
    assert ends[1][-1] < ends[1][0] - 0.2
    assert ends[0] == ends[1]


def test_another_shape_adapter_and_mode(artifact, caplog):
    model = adapted(artifact("nf4"))
    step = MicroStep(model)
    ids = BATCHES[0]
    first = step(input_ids=ids, labels=ids)
    short = ids[:, :32]
    with surogate_load.step.attention.fastest_attention():
        torch.testing.assert_close(
            step(input_ids=short, labels=short), model(input_ids=short, labels=short).loss.detach()
        )
    assert "another shape" in caplog.text
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("other")
    other = step(input_ids=ids, labels=ids)
    with surogate_load.step.attention.fastest_attention():
        torch.testing.assert_close(other, model(input_ids=ids, labels=ids).loss.detach(), rtol=1e-3, atol=1e-3)
    assert other != first


def test_stochastic_noise_differs_from_replay_to_replay(artifact):
    model = adapted(artifact("fp4"), "nvfp4")
    step = MicroStep(model)
    ids = BATCHES[0]
    drawn = []
    for _ in range(3):
        step(input_ids=ids, labels=ids)
        drawn.append(gradients(model))
        model.zero_grad()
    name = next(iter(drawn[0]))
    assert not torch.equal(drawn[1][name], drawn[2][name])


def test_nothing_waits_for_the_gpu(artifact):
    model = adapted(artifact("nf4"))
    step = MicroStep(model)
    step(input_ids=BATCHES[0], labels=BATCHES[0], num_items_in_batch=9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for ids in BATCHES:
            step(input_ids=ids, labels=ids, gradient_scale=0.5, num_items_in_batch=7)
            model.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_trainer(artifact, tmp_path):
    rows = [{"input_ids": row, "labels": row} for batch in BATCHES for row in batch.cpu()]
    ends = []
    for kind in (transformers.Trainer, surogate_load.captured(transformers.Trainer)):
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=6,
            bf16=True,
            report_to="none",
            save_strategy="no",
            seed=3,
        )
        trainer = kind(model=adapted(artifact("nf4")), args=settings, train_dataset=rows)
        ends.append(trainer.train().training_loss)
    assert ends[0] == pytest.approx(ends[1], rel=1e-2)
    assert trainer._micro_step._captures
