"""Runs what continuous integration has no time for, and prints a table; exit 1 if anything is not as it should be.

Usage: python tools/soak.py [--only NAME]...

Names: kills, signals, overwrite, power, ranks, training_ranks, disk, cycles, memory. The last packs a sparse model of
64 GB into 17 GB below the system's folder for temporary files (TMPDIR), if there is room.
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [str(ROOT / folder) for folder in ("formats", "quantizer", "runtime", "tests", "tools")]
sys.path[:0] = FOLDERS

TIMES = 100
CYCLES, SETTLED = 500, 100
GROWTH = 0.02
SIZES = (1, 8, 64)
SPREAD, BUDGET = 0.1, 2 << 30
ROOM = 30 << 30


def kills(folder: Path) -> str:
    """SIGKILL at moments spread over the life of a run, and again and again in one of SmolLM2."""
    from quantizer.killed_runs import KilledRuns
    from quantizer.test_crashes import SMALL, SMOLLM2, kill_again_and_again, kill_once_each

    from make_smollm2 import make_smollm2

    (folder / "small").mkdir()
    (folder / "smollm2").mkdir()
    smollm2 = make_smollm2(ROOT / ".demo" / "smollm2-135m")
    with KilledRuns() as runs:
        small = kill_once_each(runs, _small(folder), folder / "small", SMALL, TIMES, seed=11)
        large = kill_again_and_again(runs, smollm2, folder / "smollm2", SMOLLM2, TIMES, seed=12)
    return f"{small} runs killed once, runs of SmolLM2 killed {large} times: all artifacts equal"


def signals(folder: Path) -> str:
    """SIGTERM and SIGINT."""
    from quantizer.killed_runs import KilledRuns
    from quantizer.test_crashes import stop_and_go_on

    source = _small(folder)
    with KilledRuns() as runs:
        for number, code, word in ((signal.SIGTERM, 143, "Terminated"), (signal.SIGINT, 130, "Interrupted")):
            (folder / word).mkdir()
            stop_and_go_on(runs, source, folder / word, number, code, word, TIMES, seed=number)
    return f"{TIMES} of each: the last line is true, all artifacts equal"


def overwrite(folder: Path) -> str:
    """SIGKILL at every moment of a run that replaces an artifact."""
    from quantizer.killed_runs import KilledRuns
    from quantizer.test_crashes import kill_while_overwriting

    moments: list[int] = []

    def every(steps: int) -> list[int]:
        moments[:] = range(steps)
        return moments

    with KilledRuns() as runs:
        kill_while_overwriting(runs, _small(folder), folder, every)
    return f"{len(moments)} moments: the old one, the new one, or none that loads"


def power(folder: Path) -> str:
    """A loss of power after every step, each in several ways."""
    from quantizer.test_power_loss import record, replay

    found = []
    for name, old in (("fresh", False), ("overwrite", True)):
        (folder / name).mkdir()
        recording = record(folder / name, old=old)
        steps = len(recording.recorder.steps) + 1
        replay(recording, folder / name / "replayed", steps, 4, random.Random(13))
        states = ", ".join(f"{count} {state}" for state, count in sorted(recording.states.items()))
        found.append(f"{name}: {steps} prefixes in 5 ways ({states})")
    return "; ".join(found)


def ranks(folder: Path) -> str:
    """Four ranks, all formats, two seeds of Python's hashes; and a rank that is killed."""
    from quantizer.checkpoints import contents
    from quantizer.test_ranks import FORMATS, make, make_together

    source = _small(folder)
    for name in FORMATS:
        make(source, folder / f"one-{name}", name)
    for count in (2, 4):
        for seed in ("0", "77"):
            os.environ["PYTHONHASHSEED"] = seed
            together = folder / f"{count}-{seed}"
            together.mkdir()
            make_together(count, together, [(name, source, name) for name in FORMATS])
            for name in FORMATS:
                _expect(contents(together / name) == contents(folder / f"one-{name}"), f"{count} ranks differ: {name}")
    return f"1, 2 and 4 ranks, {', '.join(FORMATS)}, 2 hash seeds: all artifacts equal"


def training_ranks(folder: Path) -> str:
    """Four gloo ranks under DDP and FSDP2 against one; state of two goes on with four; one is killed."""
    from runtime.artifacts import tiny_llama, write_artifact
    from runtime.layers import KINDS as FORMATS
    from runtime.lora_steps import losses_of_steps
    from runtime.ranks.models import DDP, IDS, KINDS, STEPS, adapted
    from runtime.ranks.processes import run_ranks

    def make(name: str, kind: str, **changes: object) -> Path:
        (folder / name).mkdir()
        return write_artifact(tiny_llama(**changes), folder / name, FORMATS[kind])

    kinds = {*KINDS, *DDP} - {"odd"}
    paths = {kind: make(kind, kind, num_key_value_heads=4) for kind in kinds}
    paths["odd"] = make("odd", "nf4", num_key_value_heads=4, intermediate_size=131, attention_bias=True, mlp_bias=True)
    paths["one layer"] = make("one", "nf4", num_hidden_layers=1)
    saved = run_ranks(2, folder, paths, ["state"])["state"][0]["loss"]
    found = run_ranks(4, folder, paths, ["ddp", "train", "options", "trainer", "hsdp", "resumed", "kill_one"])
    found["hsdp"] = [{"odd": {"losses": losses}} for losses in found["hsdp"]]
    furthest = 0.0
    for name, recipes in (("ddp", DDP), ("train", KINDS), ("hsdp", {"odd": "bf16"})):
        for kind, recipe in recipes.items():
            alone = losses_of_steps(adapted(paths[kind], recipe), IDS, STEPS)
            away = max(abs(a / b - 1) for a, b in zip(found[name][0][kind]["losses"], alone, strict=True))
            _expect(away < (1e-5 if recipe == "bf16" else 2e-2), f"{name} {kind}: {away:.1e} away")
            furthest = max(furthest, away if recipe == "bf16" else 0.0)
    for way, loss in found["resumed"][0].items():
        _expect(abs(loss / saved - 1) < 1e-5, f"resumed from {way}: {loss}, saved at {saved}")
    _expect(len(found["kill_one"]) == 3 and all("another rank" in said for said in found["kill_one"]), "a lost rank")
    return f"losses of bf16 within {furthest:.1e} of one rank's; two save, four go on; three say who is lost"


def disk(folder: Path) -> str:
    """The tests with a small file system that fills up."""
    names = "disk_that or read_only_disk"
    tests = str(ROOT / "tests" / "quantizer" / "test_faults.py")
    line = [sys.executable, "-m", "pytest", "-q", "-rs", "-k", names, "--basetemp", str(folder / "tests"), tests]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    _expect(done.returncode == 0, done.stdout)
    return (
        done.stdout.splitlines()[-1]
        if "skipped" in done.stdout
        else "full from the start, filled up meanwhile, read-only"
    )


def cycles(folder: Path) -> str:
    """Quantizes and loads a tiny model in one process, which must not grow."""
    code = f"from pathlib import Path; from soak import cycle; cycle(Path({str(folder)!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(FOLDERS), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    _expect(done.returncode == 0, done.stderr)
    before, after = json.loads(done.stdout)
    said = f"after {SETTLED} cycles {_sizes(before)}; after {CYCLES} {_sizes(after)}"
    _expect(after["rss"] <= before["rss"] * (1 + GROWTH), said)
    _expect(after["threads"] <= before["threads"] and after["files"] <= before["files"], said)
    return said


def cycle(folder: Path) -> None:
    """The process of `cycles`: prints what it takes after some, and after all."""
    from make_tiny import make_tiny
    from surogate_load import load_model, open_artifact
    from surogate_quantize import make_options, quantize

    source, taken = make_tiny("llama", folder / "source", shards=2), []
    for number in range(1, CYCLES + 1):
        out = folder / "out"
        name = ("nf4", "fp4", "fp8")[number % 3]
        quantize(source, out, make_options(name, {}, max_shard_size="500KB"))
        with open_artifact(out) as artifact:
            next(iter(artifact.values())).dequantize()
        del artifact
        load_model(out, device="cpu")
        shutil.rmtree(out)
        gc.collect()
        if number in (SETTLED, CYCLES):
            taken.append(_taken())
    print(json.dumps(taken))


def memory(folder: Path) -> str:
    """Peak resident size for models of three sizes, as the system measures it."""
    from sparse_checkpoint import make_sparse

    found = {}
    for gigabytes in SIZES:
        if shutil.disk_usage(folder).free < ROOM * gigabytes / max(SIZES):
            print(f"memory: {gigabytes} GB left out: the disk has no room", file=sys.stderr)
            continue
        source = make_sparse(folder / f"{gigabytes}", gigabytes * 10**9)
        line = [sys.executable, "-m", "surogate_quantize", source, "--format", "nf4", "--out", folder / "out", "--json"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(FOLDERS), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(list(map(str, line)), env=environment, capture_output=True, text=True, check=False)
        _expect(done.returncode == 0, done.stderr)
        found[gigabytes] = json.loads(done.stdout)
        shutil.rmtree(folder / "out")
    said = ", ".join(
        f"{size} GB: {run['peak_rss_bytes'] / 1e6:.0f} MB, {run['megabytes_per_second']:.0f} MB/s"
        for size, run in found.items()
    )
    peaks = [run["peak_rss_bytes"] for run in found.values()]
    _expect(max(peaks) <= BUDGET, said)
    _expect(max(peaks) <= min(peaks) * (1 + SPREAD), said)
    return said


PARTS: dict[str, Callable[[Path], str]] = {
    part.__name__: part for part in (kills, signals, overwrite, power, ranks, training_ranks, disk, cycles, memory)
}


def _small(folder: Path) -> Path:
    from quantizer.checkpoints import llama, write_checkpoint

    source = write_checkpoint(folder / "model" / "source", llama(), shards=3)
    (source / "tokenizer.json").write_text("{}")
    return source


def _expect(right: bool, said: str) -> None:
    if not right:
        raise AssertionError(said)


def _taken() -> dict[str, int]:
    status = Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    files = len(list(Path("/proc/self/fd").iterdir()))
    return {"rss": int(resident.split()[1]) * 1024, "threads": threading.active_count(), "files": files}


def _sizes(taken: dict[str, int]) -> str:
    return f"{taken['rss'] / 1e6:.1f} MB, {taken['threads']} threads, {taken['files']} files"


def main() -> None:
    """Runs the parts and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone; repeatable")
    failed = False
    for name in parser.parse_args().only or PARTS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            try:
                word, said = "ok", PARTS[name](Path(folder))
            except Exception as error:
                word, said, failed = "FAILED", f"{type(error).__name__}: {error}", True
        print(f"{name:10} {word:7} {time.monotonic() - started:6.0f} s  {said}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
