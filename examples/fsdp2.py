"""The same with the base divided, too: `torchrun --nproc-per-node 2 examples/fsdp2.py ARTIFACT TEXT`."""

import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

import surogate_load

artifact, text = sys.argv[1:3]
with surogate_load.process_group() as device:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = surogate_load.load_model(artifact, device="meta", compile="layers" if device.type == "cuda" else None)
    torch.manual_seed(0)  # every rank makes the same adapters, and keeps its rows
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()
    mesh = dist.device_mesh.init_device_mesh(device.type, (ranks,))
    model = surogate_load.fully_shard(model, mesh=mesh)  # now each rank reads its rows

    tokenizer = AutoTokenizer.from_pretrained(artifact)
    ids = tokenizer(Path(text).read_text("utf-8"), return_tensors="pt")["input_ids"][0]
    length = min(256, len(ids) // ranks)
    rounds = len(ids) // (length * ranks)  # every rank has as many batches
    batches = ids[: rounds * ranks * length].view(rounds, ranks, 1, length)[:, rank].to(device)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    for number, batch in enumerate(batches[:4]):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {number}: loss {total.item() / ranks:.3f}")
    surogate_load.save_adapter(model, "adapter")
