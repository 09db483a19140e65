"""The manifest's text: stable, complete, and read back strictly."""

import json
from dataclasses import replace

import pytest

from surogate_formats.checkpoint import SourceFile
from surogate_formats.errors import ArtifactError
from surogate_formats.manifest import Manifest, TensorRecord

MANIFEST = Manifest(
    tool_version="0.1.0",
    source="org/model",
    revision="abc",
    files=(SourceFile("model.safetensors", 123, "0" * 64),),
    format={"name": "nf4", "block_size": 64, "double_quant": "affine"},
    layout="surogate",
    options={"skip": ["a.b"]},
    recipe={"name": "bf16"},
    lora={"rank": 16},
    sidecars={"config.json": "3" * 64, "additional_chat_templates/x.jinja": "4" * 64},
    tensors={
        "a.weight": TensorRecord("quantize", "linear", "BF16", (4, 64), 4.25, {"a.weight": "1" * 64}, 0.09, 0.5),
        "näme": TensorRecord("keep", "norm", "F32", (), 32.0, {"näme": "2" * 64}),
    },
)


def test_round_trip():
    text = MANIFEST.to_json()
    assert Manifest.from_json(text, "surogate.json") == MANIFEST
    assert Manifest.from_json(text.encode(), "surogate.json") == MANIFEST
    assert Manifest.from_json(text, "surogate.json").to_json() == text
    assert text.isascii()
    assert text.endswith("}\n")


def test_order_of_tensors_is_kept():
    swapped = replace(MANIFEST, tensors=dict(reversed(MANIFEST.tensors.items())))
    assert list(Manifest.from_json(swapped.to_json(), "f").tensors) == ["näme", "a.weight"]


def edited(**changes):
    data = json.loads(MANIFEST.to_json()) | changes
    return json.dumps({key: value for key, value in data.items() if value is not ...})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '"text"',
        "null",
        "[" * 100_000,
        b"\xff\xfe",
        edited(schema_version=...),
        edited(schema_version=2),
        edited(schema_version="1"),
        edited(layout=...),
        edited(tensors=...),
        edited(files=...),
        edited(new_field=1),
        edited(tensors=[]),
        edited(tensors={"a": {}}),
        edited(tensors={"a": {"shape": 3}}),
        edited(tensors={"a": 3}),
        edited(files=[{"name": "x"}]),
        edited(files=3),
        edited(sidecars=...),
        edited(sidecars=["config.json"]),
        edited(sidecars={"config.json": 3}),
        edited(sidecars={"../config.json": "3" * 64}),
        edited(sidecars={"/etc/hostname": "3" * 64}),
    ],
    ids=range(26),
)
def test_what_is_no_manifest_of_this_version_is_refused_in_one_line(text):
    with pytest.raises(ArtifactError, match=r"^out/surogate\.json: ") as caught:
        Manifest.from_json(text, "out/surogate.json")
    assert "\n" not in str(caught.value)
