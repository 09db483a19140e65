"""The block runner: block by block is the model itself, and what can't be run so is refused by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from make_tiny import make_tiny
from surogate_formats.checkpoint import Checkpoint
from surogate_load.block_runner import BlockRunner, NoBlocksError

KINDS = ("llama", "llama-tied", "qwen3", "gemma3", "phi3", "qwen3-moe", "mixtral", "gpt-oss")


@pytest.mark.parametrize("kind", KINDS)
def test_block_by_block_is_the_model(tmp_path, kind):
    source = make_tiny(kind, tmp_path / kind)
    ids = torch.randint(0, 90, (3, 40), generator=torch.Generator().manual_seed(0))
    with Checkpoint.open(source) as checkpoint:
        runner = BlockRunner(checkpoint, "cpu", torch.float32)
        hidden = runner.embed(ids)
        for index in range(runner.count):
            with runner.block(index) as block:
                hidden = runner.run(index, block, hidden)
            assert all(parameter.is_meta for parameter in block.parameters())
        found = runner.logits(hidden)
        with runner.whole() as model, torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)


def test_fewer_rows_and_other_lengths(tmp_path):
    source = make_tiny("llama", tmp_path / "llama")
    with Checkpoint.open(source) as checkpoint:
        runner = BlockRunner(checkpoint, "cpu", torch.float32)
        for rows, length in ((4, 16), (1, 7)):
            hidden = runner.embed(torch.ones(rows, length, dtype=torch.int64))
            with runner.block(1) as block:
                assert runner.run(1, block, hidden).shape == (
                    rows,
                    length,
                    runner.module("model.layers.1.mlp.up_proj").in_features,
                )


def test_modules_are_found_without_weights(tmp_path):
    with Checkpoint.open(make_tiny("llama", tmp_path / "llama")) as checkpoint:
        runner = BlockRunner(checkpoint, "cpu", torch.float32)
    assert runner.module("model.layers.1.mlp.up_proj").weight.is_meta
    for name in ("model.layers.9.mlp.up_proj", "model.layers.1.mlp.other", "lm_head", "model.layers.x.mlp"):
        assert runner.module(name) is None


@pytest.mark.parametrize("kind", ["bert"])
def test_what_cannot_be_run_block_by_block_is_refused(tmp_path, kind):
    source, message = make_tiny(kind, tmp_path / kind), r"run block by block|can't be calibrated"
    with Checkpoint.open(source) as checkpoint, pytest.raises(NoBlocksError, match=message):
        runner = BlockRunner(checkpoint, "cpu", torch.float32)
        runner.embed(torch.ones(1, 4, dtype=torch.int64))
        with runner.block(0):
            pass
