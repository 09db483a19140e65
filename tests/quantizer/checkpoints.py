"""Small checkpoints from numpy alone, in a moment; and what an artifact holds, by name."""

import json

import numpy as np
from safetensors.numpy import save_file

from surogate_formats.artifact import Artifact
from surogate_formats.checkpoint import Checkpoint
from surogate_formats.dtype_rules import STORED_AS
from surogate_formats.dtypes import NUMPY

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "dtype": "bfloat16",
    "time_step_limit": [0.0, float("inf")],
}

PROJECTIONS = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (128, 128),
    "self_attn.v_proj": (128, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (256, 128),
    "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}
"""The linears of a block. Every side divides by 128, so that every format takes every one."""

LINEARS = [f"model.layers.{layer}.{name}" for layer in range(2) for name in PROJECTIONS]


def llama(seed=0, tied=False):
    """Tensors of a Llama of two blocks, float32, by name."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (48, 128), "model.norm.weight": (128,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in PROJECTIONS.items()}
        shapes |= {f"{prefix}.input_layernorm.weight": (128,), f"{prefix}.post_attention_layernorm.weight": (128,)}
    if not tied:
        shapes["lm_head.weight"] = (48, 128)
    return {
        name: (rng.standard_normal(shape) * rng.uniform(0.02, 0.2)).astype(np.float32) for name, shape in shapes.items()
    }


def write_checkpoint(directory, tensors=None, dtype="BF16", shards=1, config=None):
    """Writes tensors in `dtype`; with several shards, tensors go to them in turn, so that groups are torn apart."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = {name: array.astype(NUMPY[dtype]) for name, array in (tensors or llama()).items()}
    (directory / "config.json").write_text(json.dumps(config or CONFIG))
    if shards == 1:
        save_file(stored, directory / "model.safetensors")
        return directory
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(sorted(stored))}
    for file in files:
        save_file({name: stored[name] for name in stored if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def contents(directory):
    """Every file of a directory, by its path in it."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def payloads(directory):
    """Every tensor of a checkpoint or artifact: name to dtype, shape and bytes."""
    with Checkpoint.open(directory) as checkpoint:
        return {
            name: (entry.info.dtype, entry.info.shape, checkpoint.read(name).tobytes())
            for name, entry in checkpoint.tensors.items()
        }


def check_artifact(source, out):
    """Holds every tensor of an artifact against what its format makes of the source's; returns the artifact's modules.

    A shared amax is taken from the tensors that the format says share it: those of one recorded global scale.
    """
    with Checkpoint.open(source) as checkpoint, Artifact.open(out) as artifact:
        artifact.verify()
        assert artifact.manifest.tensors.keys() == set(told_apart(checkpoint, artifact.manifest.tensors))
        kept = {name for name, record in artifact.manifest.tensors.items() if record.decision == "keep"}
        for name in kept:
            stored, original = artifact.checkpoint.read(name), checkpoint.read(name)
            if checkpoint.entry(name).info.dtype not in STORED_AS:
                assert stored.tobytes() == original.tobytes(), name
        for module, group in amax_groups_of(artifact.modules).items():
            weights = [checkpoint.read(f"{member}.weight").astype(np.float32) for member in group]
            weight = weights[group.index(module)]
            amax = np.max([np.abs(member).max() for member in weights]) if artifact.format.shares_amax else None
            expected = artifact.format.quantize(weight, amax)
            parts = artifact.parts(module)
            assert expected.keys() == parts.keys()
            for part, array in expected.items():
                assert parts[part].tobytes() == array.tobytes(), (module, part)
            values = artifact.format.dequantize(expected, weight.shape)
            np.testing.assert_array_equal(artifact.dequantize(module), values)
            record = artifact.manifest.tensors[f"{module}.weight"]
            error = np.linalg.norm((values - weight).astype(np.float64)) / np.linalg.norm(weight.astype(np.float64))
            np.testing.assert_allclose(record.relative_error, error, rtol=1e-4)
            assert record.max_error == np.abs(values - weight).max()
        return sorted(artifact.modules)


def told_apart(checkpoint, recorded):
    """Names of a source's tensors; of experts' weights, where the fused tensor itself isn't recorded."""
    for name in checkpoint.tensors:
        parts = () if name in recorded else checkpoint.fused_experts.get(name, ())
        yield from [part.info.name for part in parts] or [name]


FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))


def amax_groups_of(modules):
    """Modules that share an amax, written out from the rule: siblings of a fused row, experts of a layer together."""

    def key(module):
        parent, _, leaf = module.rpartition(".")
        row = next((row for row in FUSED if leaf in row), (leaf,))
        parts = parent.split(".")
        if "experts" in parts:
            parent = ".".join(parts[: parts.index("experts") + 1])
        return parent, row

    groups = {}
    for module in modules:
        groups.setdefault(key(module), []).append(module)
    return {module: groups[key(module)] for module in modules}
