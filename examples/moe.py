"""LoRA on attention and on every expert of a packed mixture: `python examples/moe.py ARTIFACT TEXT`."""

import sys
from pathlib import Path

import peft
import torch
from transformers import AutoTokenizer

import surogate_load

artifact, text = sys.argv[1:3]
device = "cuda" if torch.cuda.is_available() else "cpu"
model = surogate_load.load_model(artifact, device=device)
config = peft.LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)
model = peft.get_peft_model(model, config).train()

tokenizer = AutoTokenizer.from_pretrained(artifact)
ids = tokenizer(Path(text).read_text("utf-8"), return_tensors="pt")["input_ids"][0]
length = min(256, len(ids))
batches = ids[: len(ids) // length * length].view(-1, 1, length).to(device)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
step = surogate_load.MicroStep(model)
for number, batch in enumerate(batches[:8]):
    loss = step(input_ids=batch, labels=batch)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {number}: loss {loss.item():.3f}")
model.save_pretrained("adapter")
