"""Hostile `quantization_config`s, of artifacts and of checkpoints that others quantized."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from attacks.attack import Attack
from attacks.models import Model, edited, others, ours

from surogate_formats.artifact import IncompleteArtifactError
from surogate_formats.artifact_checks import ContradictionError
from surogate_formats.checkpoint.errors import (
    JsonEncodingError,
    JsonNestingError,
    JsonSyntaxError,
    JsonTooLargeError,
    NotAnObjectError,
    NotARegularFileError,
    UnreadableFileError,
)
from surogate_formats.errors import SurogateError
from surogate_formats.layouts import UnreadableConfigError

Base = Callable[[str], Model]

HUGE = 10**39
DEEP = json.loads("[" * 40 + "]" * 40)
ODD = (None, True, False, 0, "", 7, -1.5, "\x1b[2J", [], {}, DEEP, HUGE)
"""Values of every type, none of them right."""


def declared(kind: str, base: Base = others, error=UnreadableConfigError, **changes: object) -> Attack:
    def edit(model: Model) -> None:
        model.config["quantization_config"].update(changes)

    return Attack(edited(lambda: base(kind), edit), "open", error, "" if base is others else "config.json")


def replaced(value: object, base: Base, error: type[SurogateError]) -> Attack:
    def edit(model: Model) -> None:
        model.config["quantization_config"] = value

    return Attack(edited(lambda: base("nf4"), edit), "open", error)


def weights(kind: str, **changes: object) -> Attack:
    """Changes what compressed-tensors says of its one group's weights."""

    def edit(model: Model) -> None:
        model.config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)

    return Attack(edited(lambda: others(kind), edit), "open", UnreadableConfigError)


def odd(kind: str, key: str, good: tuple[object, ...] = (), base: Base = others) -> dict[str, Attack]:
    """Every odd value under a key, but for those that are good there."""
    values = [value for value in ODD if not any(type(value) is type(each) and value == each for each in good)]
    return {f"{kind}: {key} {json.dumps(value)[:12]}": declared(kind, base, **{key: value}) for value in values}


def beside(content: bytes | Callable[[Path], object], error: type[SurogateError]) -> Attack:
    """ModelOpt's own file, where config.json declares nothing."""

    def make(directory: Path) -> None:
        model = others("modelopt fp4")
        model.config = {}
        model.write(directory)
        path = directory / "hf_quant_config.json"
        path.write_bytes(content) if isinstance(content, bytes) else content(path)

    return Attack(make, "open", error)


def whole(content: bytes, error: type[SurogateError]) -> Attack:
    def make(directory: Path) -> None:
        others("fp8").write(directory)
        (directory / "config.json").write_bytes(content)

    return Attack(make, "open", error, "config.json")


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**30)


NONE_OR_EMPTY = (None, [])  # a list that may be left out

CONFIG_ATTACKS: dict[str, Attack] = {
    **{
        f"artifact whose config says {json.dumps(value)[:12]}": replaced(value, ours, UnreadableConfigError)
        for value in (*ODD, {"quant_method": "gguf"}, {"quant_method": ["surogate"]}, {"quant_method": HUGE})
    },
    **{
        f"nobody's, whose config says {json.dumps(value)[:12]}": replaced(value, others, IncompleteArtifactError)
        for value in (None, True, 7, "\x1b[2J", [], {}, {"quant_method": "surogate"})
    },
    **{
        f"others', of method {json.dumps(value)[:16]}": replaced({"quant_method": value}, others, UnreadableConfigError)
        for value in (*ODD, "gptq", "../x", "surogate\0")
    },
    **odd("nf4", "layout_version", base=ours),
    **odd("nf4", "block_size", base=ours),
    **odd("nf4", "double_quant", base=ours),
    **odd("nf4", "modules_to_not_convert", NONE_OR_EMPTY, ours),
    "nf4: layout_version 1.0": declared("nf4", ours, layout_version=1.0),
    "nf4: block_size 64.0": declared("nf4", ours, block_size=64.0),
    "nf4: a parameter more": declared("nf4", ours, trust_remote_code=True),
    "nf4: block_size of another": declared("nf4", ours, ContradictionError, block_size=128),
    "nf4: keeps what is quantized": declared("nf4", ours, ContradictionError, modules_to_not_convert=["m.up"]),
    "fp8: by tensor, by its config": Attack(
        edited(
            lambda: ours("fp8"),
            lambda model: model.config["quantization_config"]["config_groups"]["group_0"]["weights"].update(
                strategy="tensor"
            ),
        ),
        "open",
        ContradictionError,
    ),
    **odd("fp8 tiles", "weight_block_size", (None,)),
    **odd("fp8 tiles", "modules_to_not_convert", NONE_OR_EMPTY),
    "fp8 tiles: of 128.0": declared("fp8 tiles", weight_block_size=[128.0, 128.0]),
    "fp8 tiles: of 128 and 64": declared("fp8 tiles", weight_block_size=[128, 64]),
    **odd("fp8", "quantization_status"),
    **odd("fp8", "config_groups"),
    **odd("fp8", "format"),
    **odd("fp8", "ignore", NONE_OR_EMPTY),
    "fp8: a group of nothing": declared("fp8", config_groups={"group_0": {}}),
    "fp8: two groups": declared("fp8", config_groups={"a": {}, "b": {}}),
    "fp8: rotated": declared("fp8", transform_config={"a": 1}),
    **{f"fp8: strategy {json.dumps(value)[:12]}": weights("fp8", strategy=value) for value in ODD},
    "fp8: 8.0 bits": weights("fp8", num_bits=8.0),
    "fp8: integers": weights("fp8", type="int"),
    "fp8: symmetric 1": weights("fp8", symmetric=1),
    "fp4: group_size 16.0": weights("fp4", group_size=16.0),
    "fp4: group_size 32": weights("fp4", group_size=32),
    **odd("modelopt fp4", "quant_algo"),
    **odd("modelopt fp4", "ignore", NONE_OR_EMPTY),
    **odd("modelopt fp4", "config_groups", (None, {})),
    "modelopt fp4: group_size 32": declared("modelopt fp4", config_groups={"a": {"weights": {"group_size": 32}}}),
    **odd("bitsandbytes", "load_in_4bit", (True,)),
    **odd("bitsandbytes", "bnb_4bit_quant_type"),
    **odd("bitsandbytes", "bnb_4bit_quant_storage"),
    **odd("bitsandbytes", "bnb_4bit_use_double_quant", (True, False)),
    **odd("bitsandbytes", "llm_int8_skip_modules", NONE_OR_EMPTY),
    "bitsandbytes: load_in_8bit 0": declared("bitsandbytes", load_in_8bit=0),
    # Files
    "ModelOpt's file not JSON": beside(b"{", JsonSyntaxError),
    "ModelOpt's file a list": beside(b"[]", NotAnObjectError),
    "ModelOpt's file not UTF-8": beside(b'{"\xff":1}', JsonEncodingError),
    "ModelOpt's file of 100 000 nested lists": beside(b'{"a":' + b"[" * 100_000, JsonNestingError),
    "ModelOpt's file of 1 GB": beside(sparse, JsonTooLargeError),
    "ModelOpt's file a pipe": beside(os.mkfifo, NotARegularFileError),
    "ModelOpt's file a link to nothing": beside(lambda path: path.symlink_to("nothing"), UnreadableFileError),
    "ModelOpt's file of a number": beside(b'{"quantization": 3}', UnreadableConfigError),
    "ModelOpt's file of no algorithm": beside(b'{"quantization": {"quant_algo": null}}', UnreadableConfigError),
    "config of two million lists": whole(b'{"a":[' + b"[]," * 2_000_000 + b"1]}", JsonTooLargeError),
    "config of 5 MB with an emoji": whole(b'{"a":"' + b"a" * 5_000_000 + "😀".encode() + b'"}', JsonTooLargeError),
    "config of 15 MB of braces in a text, cut": whole(b'{"a":"' + b"{" * 900_000 + b"a" * 14_000_000, JsonSyntaxError),
}
