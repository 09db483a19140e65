"""Checks of transformers' Trainer under accelerate's own FSDP2 config."""

import torch
from runtime.ranks.models import IDS, STEPS, adapted, adapted_experts, kept_bytes


def trainer(paths, folder):
    """Losses of transformers' Trainer under accelerate's own FSDP2 config, of a model on meta; and resumed.

    Every step's global batch is all of IDS.
    """
    found = {}
    for name, resumed in (("losses", None), ("resumed", folder / "trained" / "checkpoint-1")):
        model, losses = trained_by_trainer(adapted(paths["nf4"], "bf16", "meta"), folder / "trained", resumed)
        found |= {name: losses, f"{name}, kept": kept_bytes(model)}
    found["saved"] = sorted(file.name for file in (folder / "trained" / "checkpoint-1").iterdir())
    return found


def trainer_of_experts(paths, folder):
    """The same of packed experts, and what was kept of them."""
    model, losses = trained_by_trainer(adapted_experts(paths["qwen3", "nf4"], "meta"), folder / "trained experts")
    return {"losses": losses, "kept": kept_bytes(model)}


def trained_by_trainer(model, directory, resumed=None):
    """The model after steps of Trainer, and their losses."""
    import transformers
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    import surogate_load

    layer = type(model.get_base_model().model.layers[0]).__name__
    args = transformers.TrainingArguments(
        output_dir=directory,
        max_steps=STEPS,
        per_device_train_batch_size=len(IDS) // torch.distributed.get_world_size(),
        learning_rate=1e-2,
        weight_decay=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=1e3,
        logging_steps=1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        fsdp="full_shard",
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": [layer]},
    )
    assert args.device.type == "cpu"  # which accelerate shards nothing on, by itself
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    runs = surogate_load.captured(transformers.Trainer)(model=model, args=args, train_dataset=rows)
    runs.train(resume_from_checkpoint=resumed)
    return runs.model, [entry["loss"] for entry in runs.state.log_history if "loss" in entry]
