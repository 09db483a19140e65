"""Checkpoints that others quantized: parts that are missing or wrong, and quantization states of bitsandbytes."""

import json

import numpy as np
from attacks.artifact_attacks import E4M3, NAN, drop, misshape, mistype, put
from attacks.attack import Attack
from attacks.models import Model, edited, others, parts

from surogate_formats.artifact_values import PartValueError
from surogate_formats.packed_weights import UnreadableWeightError, UnscaledWeightError

FOREIGN = ("bitsandbytes", "fp4", "modelopt fp4", "fp8", "fp8 tiles", "modelopt fp8")
STATE = "m.up.weight.quant_state.bitsandbytes__nf4"
NOT_NEEDED = ("input_scale", "quant_state")
"""Parts without which a weight can be read, or is none."""


def cases(kind: str) -> dict[str, Attack]:
    found = {}
    for key, name in parts(kind).items():
        if key in NOT_NEEDED:
            continue
        for what, edit, error in (
            ("missing", drop(name), UnscaledWeightError),
            ("of another dtype", mistype(name), UnreadableWeightError),
            ("of another shape", misshape(name), UnreadableWeightError),
        ):
            found[f"others' {kind} {key} {what}"] = Attack(edited(lambda: others(kind), edit), "open", error, "m.up")
    return found


def state(content: bytes) -> Attack:
    def edit(model: Model) -> None:
        model.tensors[STATE] = np.frombuffer(content, np.uint8)

    return Attack(edited(lambda: others("bitsandbytes"), edit), "open", UnreadableWeightError, "m.up")


def changed(**changes: object) -> Attack:
    known = json.loads(others("bitsandbytes").tensors[STATE].tobytes()) | changes
    return state(json.dumps({key: value for key, value in known.items() if value is not ...}).encode())


def replaced(name: str, array: np.ndarray, error=UnreadableWeightError, kind: str = "bitsandbytes") -> Attack:
    return Attack(edited(lambda: others(kind), lambda model: model.tensors.update({name: array})), "open", error, name)


def out_of_range(kind: str, name: str, value: object) -> Attack:
    return Attack(edited(lambda: others(kind), put(name, value)), "verify", PartValueError, name)


FOREIGN_ATTACKS: dict[str, Attack] = {
    **{name: attack for kind in FOREIGN for name, attack in cases(kind).items()},
    "others' bitsandbytes nested_absmax missing": Attack(
        edited(lambda: others("bitsandbytes"), drop("m.up.weight.nested_absmax")), "open", UnreadableWeightError, "m.up"
    ),
    # bitsandbytes' quantization state
    "state empty": state(b""),
    "state not UTF-8": state(b"\xff" * 200),
    "state a list": state(b"[]"),
    "state a pickle": state(b"cos\nsystem\n(S'true'\ntR."),
    "state of 60 000 nested lists": state(b'{"quant_type":' + b"[" * 60_000),
    "state of 60 000 digits": state(b'{"shape":[1' + b"0" * 60_000 + b",1]}"),
    "state of 1 MB": state(b" " * 2**20),
    "state names its type twice": state(b'{"quant_type":"nf4","quant_type":"fp4"}'),
    "state NaN": state(b'{"quant_type":"nf4","nested_offset":NaN}'),
    "state 1e999": state(b'{"quant_type":"nf4","nested_offset":1e999}'),
    "state of fp4": changed(quant_type="fp4"),
    "state of a list of types": changed(quant_type=["nf4"]),
    "state in blocks of 0": changed(blocksize=0),
    "state in blocks of 64.0": changed(blocksize=64.0),
    "state in blocks of true": changed(blocksize=True),
    "state in blocks of a text": changed(blocksize="64"),
    "state of shape [2^63, 2]": changed(shape=[2**63, 2]),
    "state of shape [-128, -128]": changed(shape=[-128, -128]),
    "state of shape [true, 16384]": changed(shape=[True, 16384]),
    "state of shape [128.0, 128.0]": changed(shape=[128.0, 128.0]),
    "state of three sides": changed(shape=[2, 64, 128]),
    "state of no shape": changed(shape=...),
    "state of a shape that is a text": changed(shape="128"),
    "state of other values": changed(shape=[64, 128]),
    "state of dtype null": changed(dtype=None),
    "state of dtype __import__": changed(dtype="__import__('os')"),
    "state of a list of dtypes": changed(dtype=["bfloat16"]),
    "state nested in blocks of -1": changed(nested_blocksize=-1),
    "state nested in lists": changed(nested_blocksize=[256]),
    "state nested in float64": changed(nested_dtype="float64"),
    "state of offset true": changed(nested_offset=True),
    "state of offset 10^39": changed(nested_offset=10**39),
    "state of no offset": changed(nested_offset=...),
    "state of an offset that is a list": changed(nested_offset=[0]),
    "state in float32": replaced(STATE, np.zeros(50, np.float32)),
    "map of other codes": Attack(
        edited(lambda: others("bitsandbytes"), put("m.up.weight.quant_map", 2)), "open", UnreadableWeightError, "m.up"
    ),
    "map NaN": Attack(
        edited(lambda: others("bitsandbytes"), put("m.up.weight.nested_quant_map", np.nan)),
        "open",
        UnreadableWeightError,
        "m.up",
    ),
    # Tensors whose meaning isn't known
    "a code that no scale belongs to": replaced("m.more.weight", np.zeros((4, 4), E4M3), UnscaledWeightError, "fp8"),
    "integers for a weight": replaced("m.more.weight", np.zeros((4, 4), np.int32), UnscaledWeightError, "fp8"),
    "a scale that no code belongs to": replaced(
        "m.more.weight_scale", np.ones(4, np.float32), UnscaledWeightError, "fp8"
    ),
    "zero points beside a weight": replaced(
        "m.up.weight_zero_point", np.ones(4, np.float32), UnreadableWeightError, "fp8"
    ),
    "experts in one tensor": replaced("m.up.weight", np.zeros((2, 4, 4), E4M3), UnreadableWeightError, "fp8"),
    "K no multiple of 16": replaced(
        "m.more.weight_packed", np.zeros((4, 10), np.uint8), UnreadableWeightError, "fp4"
    )._replace(names="m.more"),
    # Values
    "others' fp8 code 0x7F": out_of_range("fp8", "m.up.weight", NAN),
    "others' fp8 scale NaN": out_of_range("fp8 tiles", "m.up.weight_scale_inv", np.nan),
    "others' fp8 scale negative": out_of_range("fp8 tiles", "m.up.weight_scale_inv", -1),
    "others' fp4 scale 0x7F": out_of_range("fp4", "m.up.weight_scale", NAN),
    "others' fp4 divisor zero": out_of_range("fp4", "m.up.weight_global_scale", 0),
    "others' fp4 factor infinite": out_of_range("modelopt fp4", "m.up.weight_scale_2", np.inf),
    "others' nf4 absmax NaN": out_of_range("bitsandbytes", "m.up.weight.nested_absmax", np.nan),
}
