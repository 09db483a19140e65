"""The text that a model writes: rows of one length that begin as texts do, the same for the same seed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from make_tiny import make_tiny
from surogate_quantize.calibration import text


class Tokenizer:
    """What is asked of a tokenizer."""

    all_special_ids = (0, 1, 2)
    eos_token_id = 2

    def __init__(self, bos_token_id):
        self.bos_token_id = bos_token_id

    def __len__(self):
        return 90


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    source = make_tiny("llama", tmp_path_factory.mktemp("text") / "llama")
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def written(model, seed=0, bos=1):
    return torch.cat(list(text.written_rows(model, Tokenizer(bos), 5, 12, seed)))


@pytest.mark.parametrize(("bos", "start"), [(1, 1), (None, 2)])
def test_rows_begin_as_texts_do(model, monkeypatch, bos, start):
    monkeypatch.setattr(text, "ROWS_AT_ONCE", 2)
    rows = written(model, bos=bos)
    assert rows.shape == (5, 12)
    assert rows[:, 0].tolist() == [start] * 5
    assert all(token > 2 for token in rows[:, 1].tolist())
    assert len(set(rows[:, 1].tolist())) > 1


def test_the_seed_decides_and_nothing_else_is_disturbed(model):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    rows = written(model)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(written(model), rows)
    assert not torch.equal(written(model, seed=1), rows)


@pytest.mark.parametrize(
    ("config", "fast", "expected"),
    [
        ({"dtype": "bfloat16"}, True, torch.bfloat16),
        ({"torch_dtype": "bfloat16"}, True, torch.bfloat16),
        ({"dtype": "bfloat16"}, False, torch.float32),
        ({"dtype": "float16"}, True, torch.float32),
        ({}, True, torch.float32),
    ],
)
def test_a_model_writes_in_bfloat16_where_that_is_its_own_and_fast(monkeypatch, config, fast, expected):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: fast, raising=False)
    assert text.writing_dtype(config, "cpu") == expected


def test_a_model_without_fixed_caches_writes(model, monkeypatch):
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    assert written(model).shape == (5, 12)
