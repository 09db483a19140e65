"""Two models compared block by block: the figures of the whole models, with the memory of a block."""

import json
import logging
import shutil
from contextlib import contextmanager

import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from runtime.artifacts import write_artifact
from runtime.layers import KINDS
from runtime.test_cli import write_tokenizer
from safetensors.torch import load_file, save_file

from surogate_formats.artifact import ADAPTER, Artifact
from surogate_formats.checkpoint import Checkpoint
from surogate_load import block_evaluation, evaluation
from surogate_load.block_evaluation import NoRoomForActivationsError, evaluate_blocks
from surogate_load.block_runner import BlockRunner, NoBlocksError
from surogate_load.cli import main
from surogate_load.divergence import evaluate
from surogate_load.errors import ForeignTextError, UnreadableAdapterError
from surogate_load.evaluation import evaluate_artifact
from surogate_load.loading import load_model
from surogate_load.lora_factors import NotPlainAdapterError, read_factors
from surogate_load.model_tensors import PackedTensors
from surogate_load.saved_adapter import with_adapter

SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 96, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"tie_word_embeddings": False}),
    "qwen3-tied": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"tie_word_embeddings": True}),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, {
        "sliding_window": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 4.0, "query_pre_attn_scalar": 32,
    }),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, {
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3-moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, {
        "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 128, "tie_word_embeddings": False,
    }),
}  # fmt: skip
IDS = torch.randint(3, 64, (3, 40), generator=torch.Generator().manual_seed(0))


def made(kind, folder):
    config, model, settings = MODELS[kind]
    torch.manual_seed(0)
    dense = model(config(**SIZES | settings))
    path = write_artifact(dense, folder, KINDS["nf4"], keep=("mlp.gate.",))
    write_tokenizer(folder / "dense")
    return path


def dense_of(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent / "dense", dtype=torch.float32)


def adapter_for(path, folder, **settings):
    """A random adapter, saved; the model with it."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **settings})
    model = get_peft_model(load_model(path, dtype=torch.float32), config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return made("llama", tmp_path_factory.mktemp("evaluated"))


def by_blocks(path, adapter=None, dtype=torch.float32):
    with Artifact.open(path) as opened, Checkpoint.open(path.parent / "dense") as checkpoint:
        model, reference = (BlockRunner(each, "cpu", dtype) for each in (PackedTensors(opened), checkpoint))
        return evaluate_blocks(model, reference, IDS, adapter or {})


def assert_equal(found, expected):
    assert found.tokens == expected.tokens
    assert found.mean_kl > 0
    assert found.mean_kl == pytest.approx(expected.mean_kl, rel=1e-4)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert found.reference_perplexity == pytest.approx(expected.reference_perplexity, rel=1e-6)
    assert found.top1_agreement == expected.top1_agreement


@pytest.mark.parametrize("kind", MODELS)
def test_the_figures_are_those_of_the_whole_models(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(block_evaluation, "POSITIONS", 16)
    path = made(kind, tmp_path)
    assert_equal(by_blocks(path), evaluate(load_model(path, dtype=torch.float32), dense_of(path), IDS))


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}}],
    ids=["plain", "patterns"],
)
def test_with_an_adapter(artifact, tmp_path, settings):
    folder = adapter_for(artifact, tmp_path / "adapter", **settings)
    whole = with_adapter(load_model(artifact, dtype=torch.float32), folder)
    found = by_blocks(artifact, read_factors(folder))
    assert_equal(found, evaluate(whole, dense_of(artifact), IDS))
    assert found.mean_kl > 1.5 * by_blocks(artifact).mean_kl


def test_one_block_is_in_memory_at_a_time(artifact, monkeypatch):
    inside, most, files = 0, 0, []
    plain = BlockRunner.block

    @contextmanager
    def counted(runner, index):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        with plain(runner, index) as block:
            yield block
        inside -= 1

    class Noted(block_evaluation.Activations):
        def __init__(self, path, *rest):
            files.append(path)
            super().__init__(path, *rest)

    monkeypatch.setattr(BlockRunner, "block", counted)
    monkeypatch.setattr(block_evaluation, "Activations", Noted)
    by_blocks(artifact)
    assert (inside, most) == (0, 1)
    assert len(files) == 2
    assert not any(path.exists() for path in files)


def test_a_disk_that_is_full_is_said(artifact, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(block_evaluation.Activations, "write", full)
    with pytest.raises(NoRoomForActivationsError, match=r"No space left on device.*TMPDIR"):
        by_blocks(artifact)


def test_blocks_that_are_given_something_of_the_text_are_refused(artifact, monkeypatch):
    plain = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.forward

    def of_the_text(self, x, *rest, **others):
        cos, sin = plain(self, x, *rest, **others)
        return cos * x.mean(), sin

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaRotaryEmbedding, "forward", of_the_text)
    with pytest.raises(NoBlocksError, match="depends on the text"):
        by_blocks(artifact)


def measured(path, **settings):
    said = []
    found = evaluate_artifact(
        path, path.parent / "dense", **{"context": 40, "count": 3, "dtype": "float32", "told": said.append, **settings}
    )
    return found, said


def test_without_a_text_it_is_the_language_reference(artifact):
    found, said = measured(artifact)
    assert (found.tokens, said) == (120, [])
    assert 0 < found.mean_kl < 1
    assert 0 < found.top1_agreement < 1


def test_by_default_windows_are_as_long_as_the_model_takes(artifact):
    assert measured(artifact, context=None)[0].tokens == 3 * 96


@pytest.mark.parametrize(
    ("adapter", "message"),
    [({"use_dora": True}, "use_dora=True is more than plain LoRA"), ({"target_modules": ["lm_head"]}, "lm_head")],
    ids=["DoRA", "head"],
)
def test_other_adapters_are_evaluated_on_whole_models(artifact, tmp_path, caplog, adapter, message):
    folder = adapter_for(artifact, tmp_path / "adapter", **adapter)
    caplog.set_level(logging.ERROR)
    found, said = measured(artifact, adapter=folder)
    assert len(said) == 1
    assert message in said[0]
    assert said[0].endswith(": both models are loaded whole")
    assert found.mean_kl != measured(artifact)[0].mean_kl


def test_an_adapter_of_another_model_is_refused_before_anything_is_loaded(artifact, tmp_path, monkeypatch):
    folder = adapter_for(artifact, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = {
        name: tensor[..., :32].clone() if "lora_A" in name else tensor for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    monkeypatch.setattr(evaluation, "BlockRunner", None)
    with pytest.raises(
        UnreadableAdapterError, match=r"is no adapter for this model \(its product for .*_proj is \[\d+, 32\]"
    ):
        measured(artifact, adapter=folder)


def test_what_the_text_may_not_be(artifact, monkeypatch):
    with pytest.raises(ForeignTextError, match=r"--context 97: the model takes 96 tokens; lower it"):
        measured(artifact, context=97)
    monkeypatch.setattr(evaluation, "windows", lambda *_: torch.full((3, 40), 64))
    with pytest.raises(ForeignTextError, match="token 64, and the model knows 64"):
        measured(artifact)


def test_the_command(artifact, tmp_path):
    folder = adapter_for(artifact, tmp_path / "adapter")
    arguments = ["evaluate", str(artifact), "--against", str(artifact.parent / "dense"), "--context", "40", "--json"]
    rows = {}
    for name, more in {"none": [], "adapter": ["--adapter", str(folder)]}.items():
        found = CliRunner().invoke(main, [*arguments, "--dtype", "float32", *more])
        assert found.exit_code == 0, found.stderr + repr(found.exception)
        rows[name] = json.loads(found.stdout)
    assert list(rows["none"]) == [
        "tokens", "mean KL (nats)", "perplexity", "perplexity of the dense model", "top-1 agreement",
    ]  # fmt: skip
    assert rows["adapter"]["mean KL (nats)"] > rows["none"]["mean KL (nats)"]
    assert rows["adapter"]["perplexity of the dense model"] == rows["none"]["perplexity of the dense model"]
    own = tmp_path / "own"
    shutil.copytree(artifact, own)
    shutil.copytree(folder, own / ADAPTER)
    found = CliRunner().invoke(main, ["evaluate", str(own), *arguments[2:], "--dtype", "float32", "--adapter", "init"])
    assert json.loads(found.stdout) == rows["adapter"]
    missing = CliRunner().invoke(main, [*arguments, "--adapter", "init"])
    assert (missing.exit_code, missing.stderr.count("\n")) == (2, 1)
    assert "adapter-init: no adapter_config.json" in missing.stderr


def test_factors_that_are_none(artifact, tmp_path):
    folder = adapter_for(artifact, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if name.endswith("lora_A.weight"))
    for change, error, message in (
        ({first: tensors[first][:2].clone()}, UnreadableAdapterError, "and its rank 4"),
        ({first: None}, UnreadableAdapterError, "stands alone"),
        ({"base_model.model.lm_head.weight": torch.ones(1)}, NotPlainAdapterError, "is no matrix"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, file)
        with pytest.raises(error, match=message):
            read_factors(folder)
    file.unlink()
    with pytest.raises(UnreadableAdapterError, match="can't be read"):
        read_factors(folder)
