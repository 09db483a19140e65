"""load_model's keywords: what transformers takes goes on to it, and each of the rest gets one line."""

import pytest
import torch

from surogate_formats.errors import UsageError
from surogate_load import load_model
from surogate_load.errors import DeviceUnavailableError
from surogate_load.load_keywords import CONFIG, LOADING, REFUSED, SWITCHES, chosen_device, chosen_dtype, sort_keywords


def test_what_transformers_takes_goes_on_to_it(artifact):
    model = load_model(artifact("nf4"), attn_implementation="eager", use_cache=False, output_hidden_states=True)
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False
    assert len(model(torch.arange(4).reshape(1, 4)).hidden_states) == 3
    assert load_model(artifact("nf4"), initializer_range=0.5).config.initializer_range == 0.5


def test_every_keyword_has_one_reader():
    groups = (SWITCHES, LOADING, CONFIG, tuple(REFUSED))
    assert len({key for group in groups for key in group}) == sum(map(len, groups))
    sorted_ = sort_keywords({"margin": 1, "use_kernels": True, "use_cache": False, "hidden_act": "x"}, {"hidden_act"})
    assert sorted_ == ({"margin": 1}, {"use_kernels": True}, {"use_cache": False, "hidden_act": "x"})


@pytest.mark.parametrize("key", REFUSED)
def test_what_has_no_place_says_what_to_do(artifact, key):
    with pytest.raises(UsageError, match=f"^load_model: {key} has no place here: .{{20,}}") as caught:
        load_model(artifact("nf4"), **{key: True})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_implmentation": "eager"}, "did you mean 'attn_implementation'"),
        ({"attn_implementation": "nonsense"}, "transformers refuses attn_implementation='nonsense' ("),
        ({"device_map": "balanced"}, "device_map='balanced' has no place here: a packed model goes to one device"),
        ({"device_map": {"model": 0, "lm_head": 1}}, "a packed model goes to one device"),
        ({"device": "cuda", "device_map": "cpu"}, "device is cuda, device_map says cpu"),
        ({"dtype": "int8"}, "dtype 'int8' is none of bfloat16, float16, float32"),
        ({"dtype": "bfloat16", "torch_dtype": torch.float32}, "dtype is bfloat16, torch_dtype torch.float32"),
    ],
)
def test_wrong_keywords(artifact, arguments, message):
    with pytest.raises(UsageError) as caught:
        load_model(artifact("nf4"), **arguments)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("device", "device_map", "chosen"),
    [
        (None, None, "cpu"),
        ("cuda:1", None, "cuda:1"),
        (None, "cuda", "cuda"),
        (None, {"": 1}, "cuda:1"),
        (None, {"": "cpu"}, "cpu"),
        (None, torch.device("cpu"), torch.device("cpu")),
        ("cpu", "cpu", "cpu"),
    ],
)
def test_the_one_device(device, device_map, chosen):
    assert chosen_device(device, device_map) == chosen


def test_what_scripts_pass_anyway(artifact, monkeypatch):
    assert load_model(artifact("nf4"), device_map="auto", low_cpu_mem_usage=True).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device(None, "auto") == "cuda"
    assert chosen_device("cpu", "auto") == "cpu"


def test_the_one_dtype(artifact):
    assert chosen_dtype(None, None) is chosen_dtype("auto", None) is None
    assert chosen_dtype("torch.float16", "float16") == chosen_dtype(None, torch.float16) == torch.float16
    assert load_model(artifact("nf4"), torch_dtype="float32").dtype == torch.float32
    assert load_model(artifact("nf4"), dtype="auto").dtype == torch.bfloat16


def test_a_device_map_that_names_an_unreachable_device(artifact):
    with pytest.raises(DeviceUnavailableError):
        load_model(artifact("nf4"), device_map={"": torch.cuda.device_count() + 3})
