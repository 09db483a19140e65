"""The same with transformers' Trainer: `python examples/trainer.py ARTIFACT TEXT`."""

import sys
from pathlib import Path

import peft
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

import surogate_load

artifact, text = sys.argv[1:3]
model = surogate_load.load_model(artifact, device="cuda" if torch.cuda.is_available() else "cpu")
model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

tokenizer = AutoTokenizer.from_pretrained(artifact)
ids = tokenizer(Path(text).read_text("utf-8"))["input_ids"]
rows = [{"input_ids": ids[i : i + 256], "labels": ids[i : i + 256]} for i in range(0, len(ids) - 256, 256)]

settings = TrainingArguments(
    output_dir="trained", max_steps=8, per_device_train_batch_size=1, learning_rate=2e-4, logging_steps=1, report_to=[]
)
trainer = surogate_load.captured(Trainer)(model=model, args=settings, train_dataset=rows)  # or Trainer itself
trainer.train()
model.save_pretrained("adapter")
