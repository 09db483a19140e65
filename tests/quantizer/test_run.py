"""Whole runs: the artifact's files, that they depend on nothing but source and options, and its sidecars."""

import hashlib
import json
import os
import socket
import stat
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from formats.cases import NF4_FORMATS, NVFP4_FORMATS, name_of
from quantizer.checkpoints import CONFIG, LINEARS, check_artifact, contents, llama, payloads, write_checkpoint
from safetensors import safe_open

from surogate_formats.artifact import Artifact
from surogate_formats.checkpoint import Checkpoint, read_header
from surogate_formats.errors import NonFiniteWeightError
from surogate_formats.fp8 import FP8
from surogate_quantize import bands, make_options, quantize, weight_reader
from surogate_quantize.bands import MemoryBudgetError
from surogate_quantize.kept import COPY_PIECE
from surogate_quantize.plan import Plan, make_plan

FORMATS = [*NF4_FORMATS, *NVFP4_FORMATS, *(FP8(scaling) for scaling in ("tensor", "channel", "block"))]
ONE_OF_EACH = ("nf4", "nf4-dynamic", "fp4", "fp8")
"""Formats, and NF4 whose blocks depend on each other, in the layout that stores more than the parts."""

SIDECARS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "tokenizer.model": "m",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "chat_template.jinja": "{{ x }}",
    "generation_config.json": "{}",
    "special_tokens_map.json": "{}",
    "preprocessor_config.json": "{}",
    "LICENSE": "Apache-2.0",
    "LICENSE.txt": "Apache-2.0",
    "NOTICE": "by us",
    "additional_chat_templates/tool_use.jinja": "{{ y }}",
}
LEFT_BEHIND = (
    "README.md",
    "pytorch_model.bin",
    "modeling_custom.py",
    "model.gguf",
    ".gitattributes",
    "training_args.bin",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "source")


def make(source, out, name="nf4", parameters=None, **arguments):
    name, _, double_quant = name.partition("-")
    parameters = {"double_quant": double_quant} if double_quant else parameters
    options = {key: arguments.pop(key) for key in ("skip", "skip_first_layers", "max_shard_size") if key in arguments}
    return quantize(source, out, make_options(name, parameters or {}, **options), **arguments)


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
def test_every_parameter_combination_is_what_numpy_makes_of_the_source(source, tmp_path, fmt):
    parameters = {key: value for key, value in vars(fmt).items() if key != "scale_dtype"}
    make(source, tmp_path / "out", fmt.name, parameters)
    assert check_artifact(source, tmp_path / "out") == sorted(LINEARS)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_source_dtype(tmp_path, dtype, name):
    write_checkpoint(tmp_path / "source", dtype=dtype)
    make(tmp_path / "source", tmp_path / "out", name)
    assert check_artifact(tmp_path / "source", tmp_path / "out") == sorted(LINEARS)
    assert payloads(tmp_path / "out")["model.norm.weight"][0] == dtype


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_source_shards_output_shards_and_threads_change_no_payload(source, tmp_path, name):
    torn = write_checkpoint(tmp_path / "torn", shards=3)
    make(source, tmp_path / "whole", name, workers=1)
    make(torn, tmp_path / "from-torn", name, workers=2, max_shard_size="60kB")
    make(source, tmp_path / "cut", name, workers=3, max_shard_size="1")
    expected = payloads(tmp_path / "whole")
    assert payloads(tmp_path / "from-torn") == expected
    assert payloads(tmp_path / "cut") == expected
    records = [
        json.loads((tmp_path / out / "surogate.json").read_text())["tensors"] for out in ("whole", "from-torn", "cut")
    ]
    assert records[0] == records[1] == records[2]
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == len(llama())
    assert check_artifact(torn, tmp_path / "from-torn") == sorted(LINEARS)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_files_depend_on_the_sources_content_alone(source, tmp_path, monkeypatch, name):
    """Not on where it lies, how many threads run, the working directory, the clock, or files that aren't its own."""
    make(source, tmp_path / "one" / "out", name, workers=1)
    other = tmp_path / "another" / "much longer parent" / "source"
    write_checkpoint(other)
    (other / "README.md").write_text("changed")
    os.utime(other / "model.safetensors", (1, 1))
    monkeypatch.chdir(other.parent)
    make("source", "out", name, workers=2)
    assert contents(other.parent / "out") == contents(tmp_path / "one" / "out")


def test_no_file_tells_where_when_or_by_whom_it_was_made(source, tmp_path):
    make(source, tmp_path / "out", "fp4", max_shard_size="100kB")
    words = [str(tmp_path), str(source.parent), str(tmp_path.parent), str(Path.home()), socket.gethostname()]
    for name, data in contents(tmp_path / "out").items():
        for word in words:
            if len(word) > 3:
                assert word.encode() not in data, name
    manifest = json.loads((tmp_path / "out" / "surogate.json").read_text())
    assert manifest["source"] == "source"
    assert manifest["revision"] is None


def test_source_bytes_are_hashed_on_request_and_nothing_else_changes(source, tmp_path):
    make(source, tmp_path / "plain")
    quantize(source, tmp_path / "hashed", make_options("nf4", {}), hash_source=True)
    plain, hashed = (json.loads((tmp_path / name / "surogate.json").read_text()) for name in ("plain", "hashed"))
    for file in hashed["files"]:
        assert file.pop("sha256") == hashlib.sha256((source / file["name"]).read_bytes()).hexdigest()
    assert hashed == plain
    with Artifact.open(tmp_path / "hashed") as artifact:
        assert all(file.sha256 for file in artifact.manifest.files)
        artifact.verify()


def test_a_snapshot_in_the_hubs_cache_is_known_by_its_repository_and_revision(tmp_path):
    snapshot = tmp_path / "hub" / "models--some-org--some-model" / "snapshots" / ("a" * 40)
    blobs = write_checkpoint(tmp_path / "hub" / "models--some-org--some-model" / "blobs")
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    make(snapshot, tmp_path / "out")
    with Artifact.open(tmp_path / "out") as artifact:
        assert (artifact.manifest.source, artifact.manifest.revision) == ("some-org/some-model", "a" * 40)
        artifact.verify()
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_file_modes_are_those_of_any_other_new_file(source, tmp_path, umask):
    old = os.umask(umask)
    try:
        (source / "tokenizer.json").write_text("{}")
        (source / "tokenizer.json").chmod(0o600)
        make(source, tmp_path / "out", max_shard_size="100kB")
    finally:
        os.umask(old)
        (source / "tokenizer.json").unlink()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("limit", ["5GB", "100kB"])
def test_shards_in_every_readers_eyes(source, tmp_path, limit):
    make(source, tmp_path / "out", "fp4", max_shard_size=limit)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {}
    for path in shards:
        header = read_header(path)
        assert all(info.start % {"F32": 4, "BF16": 2}.get(info.dtype, 1) == 0 for info in header.tensors.values())
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= dict.fromkeys(opened.keys(), path.name)
            assert set(opened.keys()) == header.tensors.keys()
    index = tmp_path / "out" / "model.safetensors.index.json"
    if limit == "5GB":
        assert [path.name for path in shards] == ["model.safetensors"]
        assert not index.exists()
        return
    assert [path.name for path in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    data = json.loads(index.read_text())
    assert data["weight_map"] == dict(sorted(found.items()))
    assert data["metadata"] == {"total_size": sum(len(payload) for *_, payload in payloads(tmp_path / "out").values())}
    with Artifact.open(tmp_path / "out") as artifact:
        for module in artifact.modules:
            assert len({shard for name, shard in found.items() if name.startswith(f"{module}.")}) == 1


def test_the_manifest_records_what_decides_the_bytes(source, tmp_path):
    summary = make(source, tmp_path / "out", "nf4", {"block_size": 128}, skip=("layers.1.mlp",), skip_first_layers=1)
    manifest = json.loads((tmp_path / "out" / "surogate.json").read_text())
    data = (source / "model.safetensors").read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    assert manifest["files"] == [
        {"name": "model.safetensors", "size": len(data), "header_sha256": hashlib.sha256(header).hexdigest()}
    ]
    assert manifest["format"] == {"name": "nf4", "block_size": 128, "double_quant": "affine"}
    assert manifest["layout"] == "surogate"
    assert manifest["options"] == {
        "skip_first_layers": 1,
        "skip_last_layers": 0,
        "skip": ["layers.1.mlp"],
        "max_shard_size": 5_000_000_000,
        "quantize_lm_head": False,
        "codes": "nearest",
        "adapter_init": None,
    }
    kept = manifest["tensors"]["model.layers.1.mlp.up_proj.weight"]
    assert kept["reason"] == "matches --skip layers.1.mlp"
    assert kept["relative_error"] is None
    errors = {name: r["relative_error"] for name, r in manifest["tensors"].items() if r["decision"] == "quantize"}
    assert summary.worst == (max(errors, key=errors.get), max(errors.values()))
    for name, (_, _, payload) in payloads(tmp_path / "out").items():
        owner = name if name in manifest["tensors"] else name.partition(".weight_")[0] + ".weight"
        assert manifest["tensors"][owner]["stored"][name] == hashlib.sha256(payload).hexdigest()


def test_config_json_is_the_sources_and_how_it_is_quantized(source, tmp_path):
    make(source, tmp_path / "out", "fp8", skip_first_layers=1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    declared = config.pop("quantization_config")
    assert config == CONFIG
    assert declared["quant_method"] == "compressed-tensors"
    skipped = {name for name in LINEARS if ".layers.0." in name}
    assert set(declared["ignore"]) == {"lm_head", "model.embed_tokens"} | skipped


def test_sidecars_go_along_and_nothing_else(source, tmp_path):
    model = write_checkpoint(tmp_path / "source")
    for name, text in SIDECARS.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    for name in LEFT_BEHIND:
        (model / name).write_text("x")
    (model / "vocab.txt").symlink_to(model / "vocab.json")
    summary = make(model, tmp_path / "out")
    found = contents(tmp_path / "out")
    for name in ("model.safetensors", "config.json", "surogate.json"):
        del found[name]
    assert found == {name: text.encode() for name, text in (SIDECARS | {"vocab.txt": "{}"}).items()}
    assert set(summary.carried_over) == {name.partition("/")[0] for name in found}
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()


def test_the_sources_files_are_only_read(source, tmp_path):
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()}
    make(source, tmp_path / "out")
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()} == before


def test_kept_tensors_larger_than_a_copied_piece_and_odd_ones(tmp_path):
    rng = np.random.default_rng(0)
    extra = {
        "model.big.weight": rng.standard_normal((COPY_PIECE // 2 + 3,)).astype(ml_dtypes.bfloat16),
        "model.scalar": np.array(3, np.int64),
        "model.empty": np.empty((0, 5), np.float16),
        "model.mask": np.array([True, False]),
    }
    extra["model.big.weight"][0] = np.inf
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in llama().items()} | extra
    from safetensors.numpy import save_file

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    summary = make(tmp_path / "source", tmp_path / "out", "fp8")
    assert summary.warnings == ("model.big.weight is kept as it is, and holds a NaN or an infinity",)
    assert check_artifact(tmp_path / "source", tmp_path / "out") == sorted(LINEARS)
    found = payloads(tmp_path / "out")
    assert found["model.scalar"] == ("I32", (), np.int32(3).tobytes())
    assert found["model.mask"] == ("U8", (2,), b"\1\0")
    assert found["model.empty"] == ("F16", (0, 5), b"")


def test_what_is_not_finite_in_a_kept_tensor_is_kept_and_said(tmp_path):
    tensors = llama()
    tensors["model.norm.weight"][7] = np.nan
    write_checkpoint(tmp_path / "source", tensors)
    summary = make(tmp_path / "source", tmp_path / "out")
    assert summary.warnings == ("model.norm.weight is kept as it is, and holds a NaN or an infinity",)
    check_artifact(tmp_path / "source", tmp_path / "out")


def test_the_advice_about_2d_scales_is_measured_and_given_where_it_holds(source, tmp_path):
    from surogate_formats.recipe import Recipe
    from surogate_formats.training_config import TrainingConfig

    (warning,) = make(source, tmp_path / "2d", "fp4").warnings
    assert "`two_d=False`" in warning
    one = make(source, tmp_path / "1d", "fp4", {"two_d": False})
    assert one.warnings == ()
    assert make(source, tmp_path / "nf4", "nf4").warnings == ()
    training = TrainingConfig(format_name="fp4", recipe=Recipe("nvfp4"))
    assert quantize(source, tmp_path / "nvfp4", make_options(None, {}, training=training)).warnings == ()


@pytest.mark.parametrize(
    ("name", "dtype", "warned"),
    [("fp4", "BF16", False), ("fp4", "F16", True), ("fp8", "F32", True), ("fp8", "BF16", False), ("nf4", "F16", False)],
)
def test_a_dtype_that_plain_readers_take_worse_is_said(tmp_path, name, dtype, warned):
    write_checkpoint(tmp_path / "source", dtype=dtype)
    parameters = {"two_d": False} if name == "fp4" else {}
    lines = make(tmp_path / "source", tmp_path / "out", name, parameters).warnings
    assert any(f"the source is {dtype}: plain transformers" in line for line in lines) == warned
    assert len(lines) == warned


def test_code_that_the_config_names_and_that_stays_behind_is_said(tmp_path):
    config = CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    write_checkpoint(tmp_path / "source", config=config)
    (warning,) = make(tmp_path / "source", tmp_path / "out").warnings
    assert "auto_map" in warning


def test_progress_tells_the_plan_first_and_then_every_tensor_in_its_order(source, tmp_path):
    seen = []

    def watch(made, todo):
        assert list(made.tensors) == todo
        assert isinstance(made, Plan)
        seen.append(made)
        return seen.append

    make(source, tmp_path / "out", watch=watch)
    made, *tensors = seen
    assert tensors == list(made.tensors)


def test_overwrite_replaces_an_artifact_whole(source, tmp_path):
    make(source, tmp_path / "out", "nf4", max_shard_size="60kB")
    make(source, tmp_path / "out", "fp8", overwrite=True)
    make(source, tmp_path / "fresh", "fp8")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_fused_groups_share_one_amax_where_the_format_has_one_scale(source, tmp_path):
    for name, part, parameters in (("fp4", "global_scale", {"global_scale": "amax"}), ("fp8", "scale", {})):
        make(source, tmp_path / name, name, parameters)
        with Artifact.open(tmp_path / name) as artifact:
            scale = {module: float(artifact.parts(module)[part][0]) for module in artifact.modules}
        for layer in range(2):
            prefix = f"model.layers.{layer}"
            assert len({scale[f"{prefix}.self_attn.{leaf}_proj"] for leaf in "qkv"}) == 1
            assert scale[f"{prefix}.mlp.gate_proj"] == scale[f"{prefix}.mlp.up_proj"]
        assert len(set(scale.values())) == 8


@pytest.fixture(scope="module")
def tall(tmp_path_factory):
    """Weights of more rows than a band of 80 KiB holds, the last band ragged."""
    names = [f"model.layers.{i}.mlp.{leaf}_proj.weight" for i in range(2) for leaf in ("gate", "up")]
    values = np.random.default_rng(3)
    tensors = {name: values.standard_normal((1152, 256)).astype(ml_dtypes.bfloat16) for name in names}
    return write_checkpoint(tmp_path_factory.mktemp("tall") / "source", tensors)


@pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
def test_bands_of_weights_and_groups_read_twice_give_the_same_bytes(tall, tmp_path, monkeypatch, fmt):
    parameters = {key: value for key, value in vars(fmt).items() if key != "scale_dtype"}
    make(tall, tmp_path / "whole", fmt.name, parameters)
    monkeypatch.setattr(bands, "LARGEST", 80 << 10)
    made = make_plan(Checkpoint.open(tall), make_options(fmt.name, parameters))
    assert min(len(list(bands.cut_bands(fmt, tensor, 80 << 10))) for tensor in made.quantized) > 5
    make(tall, tmp_path / "bands", fmt.name, parameters)
    assert contents(tmp_path / "bands") == contents(tmp_path / "whole")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_a_weight_that_comes_in_bands_is_named_with_its_index(tall, tmp_path, monkeypatch, bad):
    name = "model.layers.1.mlp.up_proj.weight"
    with Checkpoint.open(tall) as checkpoint:
        tensors = {key: checkpoint.read(key) for key in checkpoint.tensors}
    tensors[name][1100, 17] = bad
    source = write_checkpoint(tmp_path / "source", tensors)
    monkeypatch.setattr(bands, "LARGEST", 80 << 10)
    monkeypatch.setattr(weight_reader, "COPY_PIECE", 1 << 12)
    with pytest.raises(NonFiniteWeightError, match=rf"tensor {name}: \[1100, 17\] is {bad}"):
        make(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_budget_that_nothing_fits_in_is_refused(source, tmp_path):
    with pytest.raises(MemoryBudgetError, match=r"`max_memory` 300 MiB: at least 376 MiB are needed"):
        make(source, tmp_path / "out", max_memory="300MiB")
    with pytest.raises(MemoryBudgetError, match=r"`max_memory` 1000 bytes: at least 376 MiB are needed"):
        make(source, tmp_path / "out", max_memory="1KB")
    odd = {"model.layers.0.mlp.up_proj.weight": np.ones((16384, 1031), ml_dtypes.bfloat16)}
    wide = write_checkpoint(tmp_path / "wide", odd)
    with pytest.raises(MemoryBudgetError, match=r"up_proj\.weight \[16384, 1031\] can't be cut .* it takes 546 MiB"):
        make(wide, tmp_path / "out", max_memory="400MiB")
    assert not (tmp_path / "out").exists()
    make(wide, tmp_path / "out", max_memory="546MiB")
