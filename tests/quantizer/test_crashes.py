"""Signals at any moment of a run, publishing included: the same command finishes it, and no byte is another."""

import hashlib
import random
import re
import shutil
import signal

import pytest
from quantizer.checkpoints import contents, llama, write_checkpoint
from quantizer.killed_runs import KilledRuns

from surogate_formats.artifact import STAGING, Artifact

SMALL = ("--format", "nf4", "--max-shard-size", "100KB", "-q")
SMOLLM2 = ("--format", "nf4", "--max-shard-size", "20MB", "-q")
OLD = ("--format", "fp8", "--max-shard-size", "100KB", "-q")


@pytest.fixture(scope="module")
def runs():
    with KilledRuns() as running:
        yield running


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / "source", llama(), shards=3)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def hashes(directory):
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(directory).items()}


def undisturbed(runs, source, folder, command):
    """The hashes of what a run makes that nothing stops, and how many steps it takes."""
    folder.mkdir()
    ended = runs.run(folder, source, *command, "--out", folder / "out")
    assert ended.code == 0, ended.stderr
    return hashes(folder / "out"), ended.steps


def kill_once_each(runs, source, folder, command, times, seed):
    """Kills `times` runs, at moments spread over a run's whole life, and finishes each; returns how many died."""
    expected, steps = undisturbed(runs, source, folder / "undisturbed", command)
    rng, killed = random.Random(seed), 0
    for turn in range(times):
        at = int((turn + rng.random()) * steps / times)
        disk = folder / f"killed-{turn}"
        disk.mkdir()
        ended = runs.run(disk, source, *command, "--out", disk / "out", at=at)
        killed += ended.killed
        finish(runs, source, disk, command)
        assert hashes(disk / "out") == expected, at
        shutil.rmtree(disk)
    return killed


def kill_again_and_again(runs, source, folder, command, times, seed):
    """Kills one run and those that go on with it, `times` in all, and finishes it."""
    expected, steps = undisturbed(runs, source, folder / "undisturbed", command)
    rng, killed, disk = random.Random(seed), 0, folder / "disk"
    disk.mkdir()
    while killed < times:
        ended = runs.run(disk, source, *command, "--out", disk / "out", at=rng.randrange(2 * steps // 3))
        killed += ended.killed
        if (disk / "out" / "surogate.json").exists():
            assert without_staging(disk / "out") == expected
            shutil.rmtree(disk)
            disk.mkdir()
    finish(runs, source, disk, command)
    assert hashes(disk / "out") == expected
    return killed


def finish(runs, source, disk, command):
    """Gives the command once more where the artifact isn't complete; what is of use by then is not made again."""
    out = disk / "out"
    if (out / "surogate.json").exists() and "--overwrite" not in command:
        shutil.rmtree(out / STAGING, ignore_errors=True)  # killed while it was taken away
        return
    ended = runs.run(disk, source, *command, "--out", out)
    assert (ended.code, ended.stderr) == (0, f"{out}\n")
    assert not (out / STAGING).exists()


def without_staging(out):
    return {name: digest for name, digest in hashes(out).items() if not name.startswith(STAGING)}


def assert_no_mix(out, old, new):
    """An old artifact whole, the new one whole, or nothing that a loader takes for a model."""
    found = without_staging(out)
    if "surogate.json" in found:
        assert found in (old, new)
        with Artifact.open(out) as artifact:
            artifact.verify()
    elif "config.json" in found:  # a loader that knows no manifest must not find a mix either
        assert found in [{name: whole[name] for name in whole if name != "surogate.json"} for whole in (old, new)]


def kill_while_overwriting(runs, source, folder, moments):
    """Kills runs that replace an artifact, and finishes each; `moments` chooses them from a number of steps."""
    old, _ = undisturbed(runs, source, folder / "old", OLD)
    shutil.copytree(folder / "old", folder / "new")
    command = (*SMALL, "--overwrite")
    steps = runs.run(folder / "new", source, *command, "--out", folder / "new" / "out").steps
    new = hashes(folder / "new" / "out")
    for at in moments(steps):
        disk = folder / f"killed-{at}"
        shutil.copytree(folder / "old", disk)
        assert runs.run(disk, source, *command, "--out", disk / "out", at=at).killed
        assert_no_mix(disk / "out", old, new)
        finish(runs, source, disk, command)
        assert hashes(disk / "out") == new, at
        shutil.rmtree(disk)


def stop_and_go_on(runs, source, folder, number, code, word, times, seed):
    """Sends a signal that a run may answer; what its last line says must be so, and the same command goes on."""
    expected, steps = undisturbed(runs, source, folder / "undisturbed", SMALL)
    rng, said = random.Random(seed), set()
    for turn in range(times):
        disk = folder / f"stopped-{turn}"
        disk.mkdir()
        out = disk / "out"
        at = int((turn + rng.random()) * steps / times)
        ended = runs.run(disk, source, *SMALL, "--out", out, at=at, number=number)
        said.add(answer(ended, out, code, word))
        if not (out / "surogate.json").exists():
            finish(runs, source, disk, SMALL)
        assert hashes(out) == expected, at
        shutil.rmtree(disk)
    return said


def answer(ended, out, code, word):
    """What a stopped run has answered: `nothing`, `some` or `complete`."""
    if ended.code == 0:  # ignored in the moment of publishing
        assert ended.stderr == f"{out}\n"
        return "complete"
    assert ended.code == code, ended.stderr
    if ended.stderr == f"{word}; nothing was left behind.\n":
        assert not out.exists()
        return "nothing"
    if ended.stderr == f"{word}; {out} is complete.\n":
        assert (out / "surogate.json").exists()
        return "complete"
    line = rf"{word}; (\d) of 3 shards are finished, and the same command goes on from there\.\n"
    assert len(list((out / STAGING / "shards").glob("*.json"))) == int(re.fullmatch(line, ended.stderr)[1])
    assert not list(out.rglob("*.part"))
    return "some"


def test_ten_kills(runs, source, tmp_path):
    assert kill_once_each(runs, source, tmp_path, SMALL, 10, seed=1) == 10


def test_ten_kills_of_smollm2(runs, smollm2_dir, tmp_path):
    assert kill_again_and_again(runs, smollm2_dir, tmp_path, SMOLLM2, 10, seed=2) >= 10


def test_what_was_finished_is_not_made_again(runs, source, tmp_path):
    _, steps = undisturbed(runs, source, tmp_path / "undisturbed", SMALL)
    (tmp_path / "disk").mkdir()
    assert runs.run(tmp_path / "disk", source, *SMALL, "--out", tmp_path / "disk" / "out", at=steps - 40).killed
    rerun = [argument for argument in SMALL if argument != "-q"]
    ended = runs.run(tmp_path / "disk", source, *rerun, "--out", tmp_path / "disk" / "out")
    assert re.search(r"reused\W+[23] of 3 shards", ended.stderr), ended.stderr


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "Terminated"), (signal.SIGINT, 130, "Interrupted")], ids=str
)
def test_signals_that_a_run_answers(runs, source, tmp_path, number, code, word):
    said = stop_and_go_on(runs, source, tmp_path, number, code, word, 12, seed=number)
    assert said == {"nothing", "some", "complete"}


def test_another_command_starts_anew_over_what_a_kill_has_left(runs, source, tmp_path):
    """Killed in the middle of publishing; the other command is killed, too, while it takes the rest away."""
    expected, _ = undisturbed(runs, source, tmp_path / "undisturbed", OLD)
    _, steps = undisturbed(runs, source, tmp_path / "killed", SMALL)
    # Some 50 steps before the end one of the shards is finished, whichever thread was ahead; at 60 it may be none.
    for at, again in [(steps - 18, again) for again in range(20)] + [(steps - 14, 7), (steps - 50, 2)]:
        disk = tmp_path / f"{at}-{again}"
        disk.mkdir()
        assert runs.run(disk, source, *SMALL, "--out", disk / "out", at=at).killed
        refused = runs.run(disk, source, *OLD, "--out", disk / "out")
        assert refused.code == 2
        assert "holds an unfinished run of another command (format.name 'nf4' there, 'fp8' here)" in refused.stderr
        assert runs.run(disk, source, *OLD, "--overwrite", "--out", disk / "out", at=again).killed
        finish(runs, source, disk, (*OLD, "--overwrite"))
        assert hashes(disk / "out") == expected


def test_kills_while_an_artifact_is_replaced(runs, source, tmp_path):
    def publishing_and_some(steps):
        return sorted({*random.Random(3).sample(range(steps - 45), 4), *range(steps - 45, steps, 2)})

    kill_while_overwriting(runs, source, tmp_path, publishing_and_some)
