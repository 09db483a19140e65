"""Checks of what ranks save, and go on with."""

import torch
from runtime.ranks.models import mean, mesh, my_share, sharded


def state(paths, folder):
    """Saves on these ranks: the adapter by PEFT, everything that trains by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    import surogate_load

    model = sharded(paths["nf4"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step(model, optimizer)
    surogate_load.save_adapter(model, folder / "adapter")
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoint")
    return {"loss": mean([step(model, optimizer)])[0], "saved": list(weights)}


def loaded(paths, folder):
    """Losses of a sharded model, and of another one that got its state; its scales are others."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    rows = my_share()
    one, other = sharded(paths["fp8-tensor"]), sharded(paths["other scales"])
    losses = [model(input_ids=rows, labels=rows).loss.item() for model in (one, other)]
    set_model_state_dict(one, get_model_state_dict(other))
    return mean([*losses, one(input_ids=rows, labels=rows).loss.item()])


def resume(path, folder):
    """The loss of the step after `state`, from its checkpoint, and from its adapter alone."""
    import peft
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    import surogate_load

    model = sharded(path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoint")
    partly = StateDictOptions(strict=False)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=partly)
    found = {"checkpoint": mean([step(model, optimizer)])[0]}
    base = surogate_load.load_model(path, dtype=torch.float32, device="meta")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()
    model = surogate_load.fully_shard(model, mesh=mesh())
    rows = my_share()
    return {**found, "adapter": mean([model(input_ids=rows, labels=rows).loss.item()])[0]}


def resumed(paths, folder):
    """See `resume`."""
    return resume(paths["nf4"], folder)


def step(model, optimizer):
    rows = my_share()
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
