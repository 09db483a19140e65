"""What a model is computed in on a GPU that lacks something, and what is said where it has no room."""

import pytest
import torch

from surogate_formats.artifact import Artifact
from surogate_load import load_model, loading
from surogate_load.device_choice import default_dtype, memory_errors
from surogate_load.errors import DeviceMemoryError, UnsupportedDeviceError


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_float16_where_bfloat16_is_not_multiplied(artifact, monkeypatch, caplog, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with Artifact.open(artifact("nf4")) as opened:
        assert default_dtype(opened, torch.device("cuda")) == dtype
        assert default_dtype(opened, torch.device("cpu")) == torch.bfloat16
    assert ("compute capability 7.5" in caplog.text) is (dtype == torch.float16)


def test_no_memory_left_is_one_line(artifact, monkeypatch):
    def read(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(loading, "_read_model", read)
    with pytest.raises(DeviceMemoryError, match=r"^cpu: no room for \S+, whose weights take 0\.0 GB; [^\n]*$"):
        load_model(artifact("nf4"))


def test_other_errors_pass(artifact):
    with (
        Artifact.open(artifact("nf4")) as opened,
        pytest.raises(ZeroDivisionError),
        memory_errors(opened, torch.device("cpu")),
    ):
        raise ZeroDivisionError


def test_a_recipe_is_refused_before_anything_is_read(artifact, monkeypatch):
    monkeypatch.setattr(loading, "_read_model", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UnsupportedDeviceError, match=r"compute capability 8\.9"):
        load_model(artifact("fp8-tensor"), recipe="fp8-hybrid")
