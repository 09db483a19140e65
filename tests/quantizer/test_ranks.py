"""Many ranks under torchrun: the bytes of one, one line when one of them fails, and a rerun that goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from quantizer.checkpoints import contents, llama, write_checkpoint
from torch import distributed

from surogate_formats.artifact import STAGING
from surogate_quantize import make_options, quantize
from surogate_quantize.ranks import sharing, team
from surogate_quantize.ranks.errors import NotSharedError, RankLostError, StoppedByTeamError
from surogate_quantize.ranks.team import TorchTeam

ROOT = Path(__file__).resolve().parents[2]

FORMATS = {"nf4": ("nf4", {}), "fp4": ("fp4", {"two_d": False}), "fp8": ("fp8", {})}
"""What ranks make: fp4 with groups that stand in several output shards, hence on several ranks."""

SHARDS = {"max_shard_size": "60KB"}
"""Nine shards or so, so that every one of four ranks has some."""

LAST = "model.layers.1.self_attn.v_proj.weight"
"""The last weight in the plan's order."""

SEVERAL = """
import json, os, sys
from surogate_formats.errors import SurogateError
from surogate_quantize import make_options, quantize
rank, said = os.environ["RANK"], {}
for name, source, out, format_name, parameters in json.loads(sys.argv[1]):
    try:
        options = make_options(format_name, parameters | {}, max_shard_size="60KB",
                               skip_last_layers=int(rank) if name == "different" else None)
        quantize(source, out, options, ranks=True, workers=1)
    except SurogateError as error:
        said[name] = [type(error).__name__, str(error)]
with open(sys.argv[2] + rank, "w") as file:
    json.dump(said, file)
"""
"""Several artifacts in one process, as each start of torchrun takes seconds."""

KILLED = """
import os, signal
from surogate_quantize import entry, output_shards
if os.environ["RANK"] == "1":
    finish = output_shards.OutputShards.finish
    def killed(self, *arguments):
        finish(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)
    output_shards.OutputShards.finish = killed
entry.main()
"""


def torchrun(count, *command, **environment):
    """Runs a command as so many ranks; `-m module` or a script."""
    path = os.pathsep.join(str(ROOT / name) for name in ("formats", "quantizer", "runtime"))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*line, *map(str, command)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def script(folder, text):
    path = folder / "script.py"
    path.write_text(text)
    return path


def errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("Error: ")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "source", llama(), shards=3)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    tensors = llama()
    tensors[LAST][100, 7] = np.nan
    return write_checkpoint(tmp_path_factory.mktemp("models") / "broken", tensors, shards=3)


def make(source, out, name, **how):
    format_name, parameters = FORMATS[name]
    quantize(source, out, make_options(format_name, parameters, **SHARDS), **how)
    return contents(out)


def make_together(count, folder, jobs):
    """Makes artifacts one after the other on so many ranks; returns what each rank says of those that failed."""
    rows = [(name, str(source), str(folder / name), *FORMATS[made]) for name, source, made in jobs]
    done = torchrun(count, script(folder, SEVERAL), json.dumps(rows), folder / "said")
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"said{rank}").read_text()) for rank in range(count)]


def test_two_ranks_give_the_bytes_of_one_and_fail_as_one(source, broken, tmp_path):
    jobs = [("fp4", source, "fp4"), ("broken", broken, "fp4"), ("nf4", source, "nf4"), ("different", source, "nf4")]
    said = make_together(2, tmp_path, jobs)
    for name in ("fp4", "nf4"):
        assert contents(tmp_path / name) == make(source, tmp_path / f"one-{name}", name)
    where = f"{broken / 'model-00001-of-00003.safetensors'}: tensor {LAST}: [100, 7] is nan"
    first, second = (rank["broken"] for rank in said)
    assert [first[0], second[0]] == ["NonFiniteWeightError"] * 2
    assert LAST in where
    assert f"tensor {LAST}: [100, 7] is nan" in first[1]
    assert f"tensor {LAST}: [100, 7] is nan" in second[1]
    assert sorted(text[1].startswith("rank ") for text in (first, second)) == [False, True]
    for rank in said:
        assert rank.keys() == {"broken", "different"}
    differences = [rank["different"] for rank in said]
    assert [kind for kind, _ in differences] == ["DifferentPlansError"] * 2
    assert all("options.skip_last_layers" in text and "same command" in text for _, text in differences)
    assert not (tmp_path / "broken").exists()
    assert not (tmp_path / "different").exists()


def test_a_weight_that_is_wrong_on_one_rank_is_one_line(broken, tmp_path):
    done = torchrun(2, "-m", "surogate_quantize", broken, "--format", "nf4", "--max-shard-size", "60KB", "--out",
                    tmp_path / "out")  # fmt: skip
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = errors(done)
    assert f"tensor {LAST}: [100, 7] is nan" in line
    assert not (tmp_path / "out").exists()


def test_a_rank_that_is_killed_fails_the_job_and_the_rerun_goes_on(source, tmp_path):
    out = tmp_path / "out"
    done = torchrun(2, script(tmp_path, KILLED), source, "--format", "fp4", "--1d", *flags(), "--out", out)
    assert done.returncode != 0
    assert f"exitcode  : {-signal.SIGKILL}" in done.stderr
    finished = len(list((out / STAGING / "shards").glob("*.json")))
    assert finished
    summary = quantize(source, out, make_options(*FORMATS["fp4"], **SHARDS))
    assert summary.reused_shards == finished
    assert contents(out) == make(source, tmp_path / "one", "fp4")


def flags():
    return [text for name, value in SHARDS.items() for text in (f"--{name.replace('_', '-')}", value)]


@pytest.mark.parametrize("name", FORMATS)
def test_workers_and_memory_change_no_byte(source, tmp_path, name):
    expected = make(source, tmp_path / "one", name, workers=1)
    assert make(source, tmp_path / "four", name, workers=4) == expected
    assert make(source, tmp_path / "little", name, max_memory="400MiB") == expected


def test_a_weight_in_bands_changes_no_byte(source, tmp_path, monkeypatch):
    for name in FORMATS:
        expected = make(source, tmp_path / f"whole-{name}", name)
        with monkeypatch.context() as patch:
            patch.setattr("surogate_quantize.run.band_bytes", lambda budget: 2 * 128 * 32)
            assert make(source, tmp_path / f"bands-{name}", name) == expected


def test_the_seed_of_hashes_changes_no_byte(source, tmp_path):
    for seed in ("0", "4242"):
        line = [sys.executable, "-m", "surogate_quantize", source, "--format", "fp4", "--out", tmp_path / seed, "-q"]
        path = os.pathsep.join(str(ROOT / name) for name in ("formats", "quantizer"))
        subprocess.run(line, env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": seed}, check=True)
    assert contents(tmp_path / "0") == contents(tmp_path / "4242")


def test_a_directory_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "PATIENCE", 0.0)
    with pytest.raises(NotSharedError, match=rf"^`out` {tmp_path}: .*give a directory of a file system that all"):
        sharing._await(tmp_path / STAGING / "1.nonce")
    (tmp_path / "there").touch()
    sharing._await(tmp_path / "there")


@pytest.fixture
def two(monkeypatch):
    """The first of two ranks, of which the second gives no sign of life."""
    monkeypatch.setattr(team, "BEAT", 0.01)
    one = TorchTeam(distributed.HashStore(), 0, 2)
    yield one
    one.close()


def test_a_rank_that_is_silent_is_given_up(two, monkeypatch):
    monkeypatch.setattr(team, "SILENCE", 0.2)
    with pytest.raises(RankLostError, match="rank 1 gives no sign of life; the same command goes on"):
        two.together(lambda: None)


def test_what_failed_here_is_said_also_where_the_others_are_silent(two, monkeypatch):
    monkeypatch.setattr(team, "SILENCE", 0.2)

    def fails():
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        two.together(fails)


def test_a_long_step_stops_when_another_rank_has_failed(two):
    two.pulse()
    two._store.set(team.FAILED, "")
    two._looked = 0.0
    with pytest.raises(StoppedByTeamError):
        two.pulse()
