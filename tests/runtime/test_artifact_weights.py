"""open_artifact: weights without transformers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from runtime.layers import KINDS
from runtime.test_loading import python_path

from surogate_formats.artifact import Artifact
from surogate_formats.artifact_checks import CorruptArtifactError
from surogate_formats.errors import UsageError
from surogate_load import open_artifact
from surogate_load.artifact_weights import NoSuchModuleError

UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_by_name(artifact, kind):
    with open_artifact(artifact(kind)) as opened, Artifact.open(artifact(kind)) as reference:
        assert list(opened) == list(reference.modules)
        assert len(opened) == 14
        weight = opened[UP].dequantize()
        assert weight.dtype == torch.float32
        np.testing.assert_array_equal(weight.numpy(), reference.dequantize(UP))
        assert torch.equal(opened[UP].dequantize(torch.bfloat16), weight.bfloat16())
        assert opened.verify() > 14


def test_unknown_module(artifact):
    with open_artifact(artifact("nf4")) as opened:
        assert "lm_head" not in opened
        with pytest.raises(UsageError, match=r"'lm_head': its weight was kept; .*inspect --modules"):
            opened["lm_head"]
        for asked in (UP.removeprefix("model."), f"{UP}.weight", UP.replace("up_proj", "up_porj")):
            with pytest.raises(NoSuchModuleError, match=f"did you mean '{UP}'") as caught:
                opened[asked]
            assert str(caught.value).isprintable()
        with pytest.raises(NoSuchModuleError, match="no quantized module ''; surogate-load inspect --modules"):
            opened[""]


def test_damage_is_found(artifact, tmp_path):
    for name in ("config.json", "surogate.json"):
        (tmp_path / name).write_bytes((artifact("nf4") / name).read_bytes())
    data = bytearray((artifact("nf4") / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with open_artifact(tmp_path) as opened, pytest.raises(CorruptArtifactError):
        opened.verify()


def test_needs_no_transformers(artifact):
    code = (
        f"import sys; sys.modules['transformers'] = None; import surogate_load; "
        f"print(surogate_load.open_artifact({str(artifact('nf4'))!r})[{UP!r}].dequantize().shape)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, env=python_path(), capture_output=True, text=True)
    assert "[256, 128]" in found.stdout
