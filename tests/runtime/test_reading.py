"""Direct reading: the model that transformers' own loop makes, in the memory in which layers are multiplied as one."""

import os
from types import SimpleNamespace

import pytest
import torch
from runtime.experts import FAMILIES
from runtime.layers import KINDS
from transformers import AutoModelForCausalLM, modeling_utils

from surogate_formats.checkpoint.errors import TruncatedFileError
from surogate_load import load_model
from surogate_load.errors import UnsupportedShardingError
from surogate_load.reading import hook, threads
from surogate_load.reading.threads import Copy, read_copies


@pytest.fixture
def left_over(monkeypatch):
    """What is left to transformers in each load: names on disk."""
    seen = []
    hooked = getattr(modeling_utils, hook._LOOP)
    original = getattr(hooked, "__wrapped__", hooked)

    def loop(model, state_dict, load_config, disk_offload_index=None):
        seen.append(set(state_dict))
        return original(model, state_dict, load_config, disk_offload_index)

    monkeypatch.setattr(modeling_utils, hook._LOOP, loop)
    return seen


def by_transformers(load, monkeypatch):
    """What `load` gives without direct reading."""
    with monkeypatch.context() as patched:
        patched.setattr(hook, "taken", lambda *_: {})
        return load()


def assert_same(model, expected):
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(as_bytes(state[name]), as_bytes(tensor)), name
    trained = {name for name, parameter in expected.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert model.training == expected.training


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_dense_models(artifact, kind, dtype, monkeypatch):
    path = artifact(kind)
    assert_same(load_model(path, dtype=dtype), by_transformers(lambda: load_model(path, dtype=dtype), monkeypatch))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts(expert_artifact, family, left_over, monkeypatch):
    path = expert_artifact(family)
    model = load_model(path)
    assert not any(".experts." in name and "bias" not in name for name in left_over[0])
    assert_same(model, by_transformers(lambda: load_model(path), monkeypatch))


def test_tied_and_untied_heads(artifact, monkeypatch):
    for tied in (True, False):
        path = artifact("nf4", tie_word_embeddings=tied)
        model = load_model(path)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert_same(model, by_transformers(lambda path=path: load_model(path), monkeypatch))


def test_from_pretrained_alike(artifact, monkeypatch):
    """Plain transformers, which leaves what isn't packed trainable."""

    def load():
        return AutoModelForCausalLM.from_pretrained(artifact("nf4"))

    assert_same(load(), by_transformers(load, monkeypatch))


def test_nothing_is_left_to_transformers(artifact, left_over):
    load_model(artifact("nf4"))
    assert left_over == [set()]


def test_what_is_cast_is_left_to_transformers(artifact, left_over):
    load_model(artifact("nf4"), dtype=torch.float16)
    packed = {name for name in left_over[0] if "proj" in name}
    assert left_over[0] and not packed


@pytest.mark.parametrize("kind", ["nf4", "fp4", "fp8-channel"])
def test_fusing_copies_nothing(artifact, kind):
    """The codes of q, k, v stand below each other from the first."""
    layer = load_model(artifact(kind, num_key_value_heads=4)).model.layers[0]
    members = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    codes = [member.parts[0] for member in members]
    fused = layer.self_attn.fused_q_proj.parts[0]
    assert fused.untyped_storage().data_ptr() == codes[0].untyped_storage().data_ptr()
    assert [each.data_ptr() for each in codes] == [
        fused.data_ptr(), fused.data_ptr() + codes[0].nbytes, fused.data_ptr() + codes[0].nbytes + codes[1].nbytes
    ]  # fmt: skip


def test_on_meta_nothing_is_read(artifact, monkeypatch):
    monkeypatch.setattr(threads, "read_at", None)
    model = load_model(artifact("nf4"), device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_file_that_shrinks_meanwhile(artifact, monkeypatch):
    def ends(descriptor, buffer, offset, where):
        raise TruncatedFileError(f"{where}: truncated: header promises 9 bytes, file has 3; download it again")

    monkeypatch.setattr(threads, "read_at", ends)
    with pytest.raises(TruncatedFileError, match=r"model.safetensors: truncated"):
        load_model(artifact("nf4"))


@pytest.mark.parametrize("staged", [64, 100, 4096])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pieces_of_any_size(tmp_path, staged, device, monkeypatch):
    """Tensors longer than a buffer, shorter, and empty; from two files; every byte arrives once."""
    monkeypatch.setattr(threads, "STAGED", staged)
    files = [tmp_path / "a", tmp_path / "b"]
    data = [os.urandom(5000), os.urandom(5000)]
    for file, content in zip(files, data, strict=True):
        file.write_bytes(content)
    places = [(which, start, size) for which in (0, 1) for start, size in ((0, 1), (1, 63), (64, 0), (70, 4000))]
    copies = [Copy(torch.zeros(size, dtype=torch.uint8, device=device), str(files[which]), start)
              for which, start, size in places]  # fmt: skip
    counted = []
    read_copies(copies, torch.device(device), counted.append)
    for (which, start, size), copy in zip(places, copies, strict=True):
        assert bytes(copy.target.cpu().numpy()) == data[which][start : start + size]
    assert sum(counted) == sum(size for *_, size in places)


def test_the_first_error_ends_all(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "STAGED", 16)
    (tmp_path / "short").write_bytes(b"x" * 100)
    target = torch.zeros(10**6, dtype=torch.uint8)
    done = []
    with pytest.raises(TruncatedFileError, match="short"):
        read_copies([Copy(target, str(tmp_path / "short"), 0)], torch.device("cpu"), done.append)
    assert sum(done) < 10**4


@pytest.mark.parametrize("argument", ["model", "state_dict", "load_config"])
def test_a_loop_with_other_arguments_is_left_alone(monkeypatch, argument):
    names = [{argument: "renamed"}.get(name, name) for name in ("model", "state_dict", "load_config")]
    loop = eval(f"lambda {', '.join(names)}: None")
    monkeypatch.setattr(modeling_utils, hook._LOOP, loop)
    hook.read_directly()
    assert getattr(modeling_utils, hook._LOOP) is loop


def test_models_of_others_go_by(monkeypatch):
    loop = hook._asking(lambda model, state_dict, load_config: "loaded")
    assert loop(None, state_dict={}, load_config=SimpleNamespace(hf_quantizer=None)) == "loaded"
    assert loop(None, {}, SimpleNamespace()) == "loaded"


def test_plans_of_transformers_are_refused_in_its_own_call(monkeypatch):
    config = SimpleNamespace(hf_quantizer=SimpleNamespace(places={"a": None}), device_mesh=object(), device_map=None)
    with pytest.raises(UnsupportedShardingError, match=r"share them between ranks with surogate_load\.fully_shard"):
        hook._asking(lambda model, state_dict, load_config: None)(None, {}, config)


def test_where_files_stand_is_forgotten_after_the_load(artifact):
    assert load_model(artifact("nf4")).hf_quantizer.places == {}
