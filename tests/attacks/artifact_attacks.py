"""Artifacts whose scales are missing, of another dtype or shape, exchanged, or out of range."""

import ml_dtypes
import numpy as np
from attacks.attack import Attack
from attacks.models import MADE, Model, edited, ours, parts

from surogate_formats.artifact_checks import ContradictionError, CorruptArtifactError
from surogate_formats.artifact_values import PartValueError

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
NAN, NEGATIVE_NAN = np.array([0x7F, 0xFF], np.uint8).view(E4M3)


def drop(name: str):
    return lambda model: model.tensors.pop(name)


def drop_everywhere(name: str):
    def edit(model: Model) -> None:
        del model.tensors[name]
        del model.manifest["tensors"]["m.up.weight"]["stored"][name]

    return edit


def mistype(name: str):
    """As many bytes of another dtype."""

    def edit(model: Model) -> None:
        array = model.tensors[name]
        other = {1: np.int8, 2: np.float16, 4: np.int32}[array.dtype.itemsize]
        model.tensors[name] = array.view(other)

    return edit


def misshape(name: str):
    """One value more."""

    def edit(model: Model) -> None:
        array = model.tensors[name]
        model.tensors[name] = np.concatenate([array.reshape(-1), array.reshape(-1)[:1]])

    return edit


def swap(part: str):
    def edit(model: Model) -> None:
        one, other = f"m.up.{part}", f"m.down.{part}"
        model.tensors[one], model.tensors[other] = model.tensors[other], model.tensors[one]

    return edit


def put(name: str, value: object):
    """A value in the last place of a tensor."""

    def edit(model: Model) -> None:
        model.tensors[name] = model.tensors[name].copy()
        model.tensors[name].reshape(-1)[-1] = value

    return edit


def cases(kind: str) -> dict[str, Attack]:
    found = {}
    for key, name in parts(kind).items():
        for what, edit, error in (
            ("missing", drop(name), ContradictionError),
            ("missing, in surogate.json too", drop_everywhere(name), ContradictionError),
            ("of another dtype", mistype(name), ContradictionError),
            ("of another shape", misshape(name), ContradictionError),
        ):
            found[f"{kind} {key} {what}"] = Attack(edited(lambda: ours(kind), edit), "open", error, name)
    return found


def swapped(kind: str, part: str) -> Attack:
    return Attack(edited(lambda: ours(kind), swap(part)), "verify", CorruptArtifactError, f"m.down.{part}")


def out_of_range(kind: str, name: str, value: object) -> Attack:
    return Attack(edited(lambda: ours(kind), put(name, value), rehash=True), "verify", PartValueError, name)


def of_another_weight(model: Model) -> None:
    state = "m.up.weight.quant_state.bitsandbytes__nf4"
    model.tensors[state] = np.frombuffer(model.tensors[state].tobytes().replace(b"[128, 128]", b"[64, 256] "), np.uint8)


ARTIFACT_ATTACKS: dict[str, Attack] = {
    **{name: attack for kind in MADE for name, attack in cases(kind).items()},
    "nf4 scales swapped": swapped("nf4", "weight_absmax_scale"),
    "nf4 offsets swapped": swapped("nf4", "weight_absmax_offset"),
    "nf4 absmax swapped": swapped("nf4 plain", "weight_absmax"),
    "bitsandbytes absmax swapped": swapped("bitsandbytes", "weight.absmax"),
    "bitsandbytes state swapped": swapped("bitsandbytes", "weight.quant_state.bitsandbytes__nf4"),
    "fp4 scales swapped": swapped("fp4", "weight_scale"),
    "fp4 global scales swapped": swapped("fp4", "weight_global_scale"),
    "fp8 scales swapped": swapped("fp8", "weight_scale"),
    "fp8 codes swapped": swapped("fp8", "weight"),
    "tiles swapped": swapped("fp8 tiles", "weight_scale_inv"),
    # Hashes of these are right.
    "fp8 code 0x7F": out_of_range("fp8", "m.up.weight", NAN),
    "fp8 code 0xFF": out_of_range("fp8 tiles", "m.up.weight", NEGATIVE_NAN),
    "fp8 scale NaN": out_of_range("fp8", "m.up.weight_scale", np.nan),
    "fp8 scale infinite": out_of_range("fp8 tiles", "m.up.weight_scale_inv", np.inf),
    "fp8 scale negative": out_of_range("fp8 tiles", "m.up.weight_scale_inv", -1),
    "fp8 scale zero": out_of_range("fp8", "m.up.weight_scale", 0),
    "fp8 scale that makes 448 infinite": out_of_range("fp8 tiles", "m.up.weight_scale_inv", 1e36),
    "fp8 input scale zero": out_of_range("modelopt fp8", "m.up.input_scale", 0),
    "fp4 scale 0x7F": out_of_range("fp4", "m.up.weight_scale", NAN),
    "fp4 scale 0xFF": out_of_range("fp4", "m.up.weight_scale", NEGATIVE_NAN),
    "fp4 scale negative": out_of_range("modelopt fp4", "m.up.weight_scale", -1),
    "fp4 divisor zero": out_of_range("fp4", "m.up.weight_global_scale", 0),
    "fp4 divisor NaN": out_of_range("fp4", "m.up.weight_global_scale", np.nan),
    "fp4 divisor near zero": out_of_range("fp4", "m.up.weight_global_scale", 1e-38),
    "fp4 divisor negative": out_of_range("fp4", "m.up.weight_global_scale", -2),
    "fp4 factor infinite": out_of_range("modelopt fp4", "m.up.weight_scale_2", np.inf),
    "fp4 factor that makes 2688 infinite": out_of_range("modelopt fp4", "m.up.weight_scale_2", 1e36),
    "nf4 absmax NaN": out_of_range("nf4 plain", "m.up.weight_absmax", np.nan),
    "nf4 absmax negative": out_of_range("nf4 plain", "m.up.weight_absmax", -1),
    "nf4 scale infinite": out_of_range("nf4", "m.up.weight_absmax_scale", np.inf),
    "nf4 offset negative": out_of_range("nf4", "m.up.weight_absmax_offset", -1),
    "bitsandbytes nested absmax NaN": out_of_range("bitsandbytes", "m.up.weight.nested_absmax", np.nan),
    "bitsandbytes map of codes": out_of_range("bitsandbytes", "m.up.weight.quant_map", 2),
    "bitsandbytes map NaN": out_of_range("bitsandbytes", "m.up.weight.nested_quant_map", np.nan),
    "bitsandbytes state of another weight": Attack(
        edited(lambda: ours("bitsandbytes"), of_another_weight, rehash=True), "verify", PartValueError, "m.up"
    ),
}
