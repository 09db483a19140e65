"""Plain transformers loads our artifacts to the logits of the same model with our dequantized weights.

Equal to the bit: an E4M3 code times a bfloat16 scale, and an E2M1 code times a scale over a power of two, are rounded
to bfloat16 once at most, whoever multiplies. No `dequantize` key is needed for bfloat16 models. Layout bitsandbytes is
read by that package, in training mode: without gradients its kernel for CPUs rounds absmax to bfloat16.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from make_tiny import KINDS
from surogate_formats.artifact import Artifact
from surogate_formats.checkpoint import Checkpoint
from surogate_quantize import make_options, quantize

FORMATS = {
    "fp4": ("fp4", {}),
    "fp4-1d": ("fp4", {"two_d": False}),
    "fp4-plain": ("fp4", {"two_d": False, "four_over_six": False}),
    "fp8-tensor": ("fp8", {}),
    "fp8-channel": ("fp8", {"scaling": "channel"}),
    "fp8-block": ("fp8", {"scaling": "block"}),
    "nf4": ("nf4", {}, "bitsandbytes"),
    "nf4-none": ("nf4", {"double_quant": "none"}, "bitsandbytes"),
    "nf4-128": ("nf4", {"block_size": 128}, "bitsandbytes"),
}

CASES = [
    *(("llama", name) for name in FORMATS),
    *(("llama-odd", name) for name in ("fp4", "fp8-tensor", "fp8-channel")),
    *(("qwen3-tied", name) for name in ("fp4", "fp8-tensor", "fp8-block", "nf4")),
    *(("gemma3", name) for name in ("fp4-1d", "fp8-channel")),
    *(("phi3", name) for name in ("fp4", "fp8-tensor")),
    *(("bert", name) for name in ("fp4", "fp8-tensor", "fp8-block")),
    ("qwen3-moe", "fp8-block"),
]
SKIPPED = {("llama", "fp8-tensor-skip"): ("fp8", {}), ("llama", "nf4-skip"): ("nf4", {}, "bitsandbytes")}
CALIBRATED = {
    ("llama", "nf4-calibrated"): ("nf4", {}, "bitsandbytes"),
    ("llama", "fp4-calibrated"): ("fp4", {"two_d": False}),
    ("llama", "fp8-calibrated"): ("fp8", {"scaling": "channel"}),
}
SMOLLM2 = ("fp4", "fp8-tensor", "nf4")


def write_dense(source, artifact_directory, target):
    """The source with the artifact's dequantized values in place of its weights, in the source's dtype."""
    target.mkdir()
    with Checkpoint.open(source) as checkpoint, Artifact.open(artifact_directory) as artifact:
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
        for module in artifact.modules:
            name = f"{module}.weight"
            tensors[name] = artifact.dequantize(module).astype(tensors[name].dtype)
        (target / "config.json").write_bytes(checkpoint.config_bytes)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def run_plain(jobs):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plain_logits.py"))],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def load_in_plain_transformers(root, cases):
    """By case: logits of the artifact, logits of the dense model, and what was odd while loading them."""
    jobs = []
    for case, source, class_name, options in cases:
        place = root / "-".join(case)
        quantize(source, place / "artifact", options)
        write_dense(source, place / "artifact", place / "dense")
        training = options.layout.name == "bitsandbytes"
        jobs += [
            (str(place / what), class_name, str(place / f"{what}.npy"), training) for what in ("artifact", "dense")
        ]
    reports = run_plain(jobs)
    logits = [np.load(file) for _, _, file, _ in jobs]
    return {case: (logits[2 * i], logits[2 * i + 1], reports[2 * i : 2 * i + 2]) for i, (case, *_) in enumerate(cases)}


def assert_same(packed, dense, reports):
    assert reports == [{}, {}]
    assert np.isfinite(dense).all()
    assert dense.std() > 0.1
    np.testing.assert_array_equal(packed, dense)


def test_tiny_models(tiny, tmp_path, subtests):
    """One test, so that one process loads them all."""
    cases = [((kind, name), tiny(kind), KINDS[kind].model, make_options(*FORMATS[name])) for kind, name in CASES]
    for case, arguments in SKIPPED.items():
        skipping = make_options(*arguments, skip_first_layers=1, skip=("layers.1.mlp",))
        cases.append((case, tiny("llama"), KINDS["llama"].model, skipping))
    text = tmp_path / "ids.jsonl"
    text.write_text("".join(json.dumps({"input_ids": list(range(start, start + 400))}) + "\n" for start in range(3, 9)))
    calibrating = {"codes": "calibrated", "calibration_text": str(text), "calibration_tokens": 600}
    for case, arguments in CALIBRATED.items():
        options = make_options(*arguments, skip_last_layers=1, **calibrating)
        cases.append((case, tiny("llama"), KINDS["llama"].model, options))
    results = load_in_plain_transformers(tmp_path, cases)
    for case, result in results.items():
        with subtests.test("-".join(case)):
            assert_same(*result)
    with subtests.test("they differ from each other, else equality would show nothing"):
        dense = [logits for (kind, _), (_, logits, _) in results.items() if kind == "llama"]
        assert len(dense) == len(FORMATS) + len(SKIPPED) + len(CALIBRATED)
        assert all(not np.array_equal(a, b) for i, a in enumerate(dense) for b in dense[:i])


def test_smollm2(smollm2_dir, tmp_path, subtests):
    cases = [(("smollm2", name), smollm2_dir, "LlamaForCausalLM", make_options(*FORMATS[name])) for name in SMOLLM2]
    for case, result in load_in_plain_transformers(tmp_path, cases).items():
        with subtests.test("-".join(case)):
            assert_same(*result)
