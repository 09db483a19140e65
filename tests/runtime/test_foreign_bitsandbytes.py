"""NF4 checkpoints of bitsandbytes itself: saved by transformers, or packed by its functions with other parameters."""

import json
import logging
import shutil

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from packaging.version import Version
from runtime.artifacts import is_block_linear, tiny_llama
from runtime.lora_steps import losses_of_four_steps
from runtime.test_cli import write_tokenizer
from safetensors.torch import load_file, save_file

from surogate_formats.errors import ArtifactError
from surogate_formats.layouts import UnreadableConfigError
from surogate_formats.packed_weights import UnreadableWeightError, UnscaledWeightError
from surogate_load import load_model, open_artifact
from surogate_load.cli import main
from surogate_load.linear import QuantizedLinear
from surogate_load.recoding import LEAST_TRANSFORMERS

pytest.importorskip("bitsandbytes")
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
UP = "model.layers.0.mlp.up_proj"
KINDS = {
    "saved": (64, False, "bfloat16"),
    "saved-double": (64, True, "bfloat16"),
    "blocks-of-128": (128, False, "bfloat16"),
    "blocks-of-128-double": (128, True, "bfloat16"),
    "float16": (64, True, "float16"),
    "float32": (64, True, "float32"),
    "nested-in-bfloat16": (64, True, "bfloat16"),
    "nested-in-bfloat16-128": (128, True, "float16"),
}
"""Kind to block size, double quantization and dtype of the source."""

NESTED_IN_BFLOAT16 = ("nested-in-bfloat16", "nested-in-bfloat16-128")
"""As bitsandbytes wrote on CPUs when it took absmax in the source's dtype."""

every_kind = pytest.mark.parametrize("kind", KINDS)


def settings(**changes):
    return transformers.BitsAndBytesConfig(**{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **changes})


def saved(directory, config):
    """What transformers writes of a model that it packed as it loaded it, and the model."""
    tiny_llama(num_key_value_heads=4).save_pretrained(directory / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "dense", dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(directory / "packed")
    return directory / "packed", model


def packed(directory, block, double, dtype, nested=None):
    """The same checkpoint by bitsandbytes' own functions, which take parameters that transformers doesn't give."""
    from bitsandbytes.functional import quantize_4bit

    model = tiny_llama(num_key_value_heads=4, dtype=dtype)
    model.save_pretrained(directory / "dense")
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not is_block_linear(name, tensor.shape):
            tensors[name] = tensor.clone()
            continue
        codes, state = quantize_4bit(tensor, blocksize=block, compress_statistics=double, quant_type="nf4")
        if double and nested is not None:
            state.state2.dtype = nested
        tensors[name] = codes
        tensors |= {f"{name}.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
    config = json.loads((directory / "dense" / "config.json").read_text())
    config["quantization_config"] = settings(bnb_4bit_use_double_quant=double).to_dict()
    (directory / "packed").mkdir()
    save_file(tensors, directory / "packed" / "model.safetensors")
    (directory / "packed" / "config.json").write_text(json.dumps(config))
    return directory / "packed"


def their_weights(path):
    """Every packed weight as bitsandbytes dequantizes it, in the dtype that it names."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tensors = load_file(path / "model.safetensors")
    weights = {}
    for name in tensors:
        module, ending, _ = name.partition(".weight.quant_state.")
        if ending:
            prefix = f"{module}.weight."
            parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            state = QuantState.from_dict(parts, torch.device("cpu"))
            weights[module] = dequantize_4bit(tensors[f"{module}.weight"], state)
    return weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            block, double, dtype = KINDS[kind]
            directory = tmp_path_factory.mktemp(kind)
            if kind.startswith("saved"):
                made[kind] = saved(directory, settings(bnb_4bit_use_double_quant=double))[0]
            else:
                nested = torch.bfloat16 if kind in NESTED_IN_BFLOAT16 else None
                made[kind] = packed(directory, block, double, dtype, nested)
        return made[kind]

    return make


def dense_twin(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent / "dense", dtype="auto")
    with torch.no_grad():
        for module, weight in their_weights(path).items():
            model.get_submodule(module).weight.copy_(weight)
    return model


def double_quant(kind):
    """In memory: absmax that is rounded on the way has no other exact form."""
    return "dynamic" if KINDS[kind][1] and kind not in NESTED_IN_BFLOAT16 else "none"


@every_kind
def test_values_are_bitsandbytes_own_bit_for_bit(checkpoint, kind):
    path = checkpoint(kind)
    theirs = their_weights(path)
    assert len(theirs) == 14
    with open_artifact(path) as opened:
        assert sorted(opened) == sorted(theirs)
        for module, weight in theirs.items():
            assert torch.equal(opened[module].dequantize(weight.dtype), weight), module
        fmt = opened.artifact.format
        assert (fmt.block_size, fmt.double_quant) == (KINDS[kind][0], double_quant(kind))


@every_kind
def test_load_model_keeps_it_packed(checkpoint, kind, caplog):
    path = checkpoint(kind)
    with caplog.at_level(logging.WARNING, logger="surogate_load"):
        model = load_model(path)
    assert not [record for record in caplog.records if record.name == "surogate_load"]
    layers = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert sorted(layers) == sorted(their_weights(path))
    assert model.get_submodule(UP).kind.format.block_size == KINDS[kind][0]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense_twin(path)(IDS).logits)


@every_kind
def test_lora_trains_on_it(checkpoint, kind):
    torch.manual_seed(0)
    model = peft.get_peft_model(load_model(checkpoint(kind)), peft.LoraConfig(r=4, target_modules="all-linear"))
    losses = losses_of_four_steps(model, IDS)
    assert losses[-1] < losses[0] - 0.1


@every_kind
def test_saving_it_keeps_every_value(checkpoint, kind, tmp_path):
    path = checkpoint(kind)
    load_model(path).save_pretrained(tmp_path / "again")
    one, other = their_weights(path), their_weights(tmp_path / "again")
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[module]) for module, weight in one.items())
    with open_artifact(tmp_path / "again") as opened:
        assert torch.equal(opened[UP].dequantize(one[UP].dtype), one[UP])


@every_kind
def test_inspect(checkpoint, kind):
    found = CliRunner().invoke(main, ["inspect", str(checkpoint(kind)), "--json"])
    assert found.exit_code == 0, found.stderr
    rows = json.loads(found.stdout)
    block, _, dtype = KINDS[kind]
    assert rows["parameters"] == {"block_size": block, "double_quant": double_quant(kind)}
    assert rows["quantized_weights"] == 14
    assert rows["tool_version"] is None
    assert 4 < rows["bits_per_quantized_weight"] < 5
    assert ("multiplies in bfloat16" in rows["loads_in"]["transformers"]) == (dtype != "bfloat16")


@every_kind
def test_dequantize_gives_bitsandbytes_weights_in_their_dtype_and_the_tokenizer(checkpoint, kind, tmp_path):
    path = shutil.copytree(checkpoint(kind), tmp_path / "packed")
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"a pickle")
    (tmp_path / "secret.json").write_text("{}")
    (path / "vocab.json").symlink_to(tmp_path / "secret.json")
    done = CliRunner().invoke(main, ["dequantize", str(path), "--out", str(tmp_path / "dense")])
    assert done.exit_code == 0, done.stderr
    written = load_file(tmp_path / "dense" / "model.safetensors")
    for module, weight in their_weights(path).items():
        assert written[f"{module}.weight"].dtype == weight.dtype
        assert torch.equal(written[f"{module}.weight"], weight)
    left_out = {"pytorch_model.bin", "vocab.json"}
    assert {file.name for file in (tmp_path / "dense").iterdir()} == {file.name for file in path.iterdir()} - left_out
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_an_adapter_merges_into_it(checkpoint, tmp_path):
    path = checkpoint("saved-double")
    model = peft.get_peft_model(load_model(path), peft.LoraConfig(r=4, target_modules=["up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    arguments = ["merge", str(path), str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    delta = model.get_base_model().get_submodule(UP).get_delta_weight("default")
    expected = (their_weights(path)[UP].float() + delta.float()).bfloat16()
    assert (merged[f"{UP}.weight"].float() - expected.float()).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.skipif(
    Version(transformers.__version__) < Version(LEAST_TRANSFORMERS), reason=f"needs transformers {LEAST_TRANSFORMERS}"
)
def test_generate_says_what_the_dense_model_says(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint("saved-double"), tmp_path / "packed")
    write_tokenizer(path)
    done = CliRunner().invoke(main, ["generate", str(path), "abcdef", "--max-new-tokens", "4"])
    assert done.exit_code == 0, done.stderr
    twin, tokenizer = dense_twin(checkpoint("saved-double")), transformers.AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        expected = twin.generate(**tokenizer("abcdef", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert done.stdout.strip() == tokenizer.decode(expected[0, 6:], skip_special_tokens=True).strip()


def edited(directory, change):
    """A checkpoint with double quantization, changed; `change` gets tensors and the quantization_config."""
    path = packed(directory, 64, True, "bfloat16")
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def state_with(module=UP, **changes):
    def change(tensors, config):
        name = f"{module}.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist())) | changes
        text = json.dumps({key: value for key, value in state.items() if value is not None})
        tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def without(ending):
    return lambda tensors, config: tensors.pop(f"{UP}.weight{ending}")


def with_tensor(ending, tensor):
    return lambda tensors, config: tensors.update({f"{UP}.weight{ending}": tensor})


def other_blocks(tensors, config):
    """One weight in blocks of 128."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(torch.randn(256, 128), blocksize=128, compress_statistics=True, quant_type="nf4")
    tensors[f"{UP}.weight"] = codes
    tensors |= {f"{UP}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def test_one_weight_nested_in_bfloat16_among_others(tmp_path):
    path = edited(tmp_path, state_with(nested_dtype="bfloat16"))
    theirs = their_weights(path)
    with open_artifact(path) as opened:
        for module, weight in theirs.items():
            assert torch.equal(opened[module].dequantize(weight.dtype), weight), module


def plain_one(tensors, config):
    """One weight without double quantization."""
    from bitsandbytes.functional import quantize_4bit

    for name in [name for name in tensors if name.startswith(f"{UP}.weight.")]:
        tensors.pop(name)
    codes, state = quantize_4bit(torch.randn(256, 128), blocksize=64, compress_statistics=False, quant_type="nf4")
    tensors[f"{UP}.weight"] = codes
    tensors |= {f"{UP}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def declared(**changes):
    return lambda tensors, config: config.update(changes)


REFUSED = {
    "fp4": (declared(bnb_4bit_quant_type="fp4"), UnreadableConfigError, "bnb_4bit_quant_type is 'fp4'"),
    "no type": (
        lambda tensors, config: config.pop("bnb_4bit_quant_type"),
        UnreadableConfigError,
        "quant_type is .?None",
    ),
    "int8": (declared(load_in_8bit=True, load_in_4bit=False), UnreadableConfigError, "load_in_8bit is .?True"),
    "storage": (declared(bnb_4bit_quant_storage="bfloat16"), UnreadableConfigError, "quant_storage is 'bfloat16'"),
    "stored in bfloat16 without a word": (
        with_tensor("", torch.zeros(8192, 1, dtype=torch.bfloat16)),
        UnreadableWeightError,
        r"up_proj: weight is BF16 \[8192, 1\], expected U8 \[16384, 1\]",
    ),
    "nested in other blocks": (state_with(nested_blocksize=128), UnreadableWeightError, "nested in blocks of 128"),
    "state of fp4": (state_with(quant_type="fp4"), UnreadableWeightError, "isn't one of nf4 but of 'fp4'"),
    "a state called fp4": (
        with_tensor(".quant_state.bitsandbytes__fp4", torch.zeros(4, dtype=torch.uint8)),
        UnreadableWeightError,
        "bitsandbytes__fp4: of bitsandbytes' types nf4 alone is read",
    ),
    "larger blocks": (state_with(blocksize=256), UnreadableWeightError, "block_size` is 256"),
    "blocks that are no integer": (state_with(blocksize=64.0), UnreadableWeightError, "block_size` is None"),
    "sides beyond reason": (state_with(shape=[2**40, 2**40]), UnreadableWeightError, "no shape"),
    "another shape": (state_with(shape=[128, 128]), UnreadableWeightError, "expected U8"),
    "no offset": (state_with(nested_offset=None), UnreadableWeightError, "no finite float32"),
    "one of other blocks": (
        other_blocks,
        UnreadableWeightError,
        "in blocks of 128 with double quantization.* in blocks of 64 with double",
    ),
    "one without double quantization": (
        plain_one,
        UnreadableWeightError,
        "in blocks of 64 without double quantization.* in blocks of 64 with double",
    ),
    "no absmax": (without(".absmax"), UnscaledWeightError, r"has no model\.layers\.0\.mlp\.up_proj\.weight\.absmax"),
    "no state": (
        without(".quant_state.bitsandbytes__nf4"),
        UnscaledWeightError,
        r"up_proj\.weight is U8, and no scale for it is known",
    ),
    "no nested map": (without(".nested_quant_map"), UnscaledWeightError, r"has no .*up_proj\.weight\.nested_quant_map"),
    "another map": (
        with_tensor(".quant_map", torch.linspace(-1, 1, 16)),
        UnreadableWeightError,
        "up_proj: its quant_map isn't the table of bitsandbytes",
    ),
    "something beside it": (
        with_tensor(".outliers", torch.zeros(4)),
        UnreadableWeightError,
        r"up_proj\.weight\.outliers: what it does to its weight isn't known",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_read_is_one_line(case, tmp_path):
    change, error, message = REFUSED[case]
    path = edited(tmp_path, change)
    for opens in (open_artifact, load_model):
        with pytest.raises(error, match=message) as caught:
            opens(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, ArtifactError)


@pytest.mark.parametrize("config", [{"load_in_8bit": True}, {"bnb_4bit_quant_type": "fp4"}], ids=str)
def test_what_transformers_saves_in_other_types_is_refused(config, tmp_path):
    choice = transformers.BitsAndBytesConfig(
        **({"load_in_4bit": True} if "load_in_8bit" not in config else {}), **config
    )
    path, _ = saved(tmp_path, choice)
    with pytest.raises(UnreadableConfigError, match=next(iter(config))):
        open_artifact(path)
