"""The same with TRL's SFTTrainer, which packs the rows: `python examples/sft.py ARTIFACT TEXT`."""

import sys
from pathlib import Path

import peft
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import surogate_load

artifact, text = sys.argv[1:3]
parts = Path(text).read_text("utf-8").split("\n\n")
rows = Dataset.from_dict({"text": [part for part in parts if part.strip()]})

trainer = SFTTrainer(
    model=surogate_load.load_model(artifact, device="cuda" if torch.cuda.is_available() else "cpu"),
    processing_class=AutoTokenizer.from_pretrained(artifact),
    train_dataset=rows,
    peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    args=SFTConfig(
        output_dir="trained",
        max_steps=8,
        per_device_train_batch_size=1,
        packing=True,
        max_length=256,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        report_to=[],
    ),
)
trainer.train()
trainer.save_model("adapter")
