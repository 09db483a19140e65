"""A loss of power after any step of a run: nothing, a run that the same command finishes, or a whole artifact."""

import json
import random
import shutil
from dataclasses import dataclass, field

import pytest
from quantizer.checkpoints import contents, write_checkpoint
from quantizer.disk_model import after_power_loss, nothing_unsynced, some_of
from quantizer.disk_recorder import Recorder

from surogate_formats.artifact import STAGING, Artifact
from surogate_quantize import make_options, quantize
from surogate_quantize.output_errors import OutputExistsError

MARKS = ("config.json", "surogate.json")


def options(name="nf4"):
    return make_options(name, {}, max_shard_size="100KB")


@dataclass
class Recording:
    """A run, step by step, what it made, and what its directory held before."""

    source: object
    recorder: Recorder
    made: dict
    old: dict
    states: dict = field(default_factory=dict)

    def lose_power(self, where, after, kept, *, resumed=True):
        """Loses power after so many steps; what is left must be absent, resumable or whole, and becomes whole."""
        steps = self.recorder.steps[:after]
        if where.exists():
            shutil.rmtree(where)
        out = after_power_loss(self.recorder.start, steps, kept).store(where) / "out"
        state = self.state_of(out)
        self.states[state] = self.states.get(state, 0) + 1
        if not resumed:
            return
        try:
            quantize(self.source, out, options(), overwrite=bool(self.old))
        except OutputExistsError:
            assert state == "the new"
        found = without_staging(out)
        assert found == self.made, (after, state)
        assert not (out / STAGING).exists() or state == "the new"

    def state_of(self, out):
        """`the new`, `the old`, or `none` where no loader takes what is there for a model; never a mix."""
        found = without_staging(out) if out.exists() else {}
        whole = {"the new": self.made, "the old": self.old}
        if "config.json" not in found:
            return "none"
        for name, files in whole.items():
            if found == files:
                with Artifact.open(out) as artifact:
                    artifact.verify()
                return name
        # What only readers that know no manifest take for a model.
        same = [files for files in whole.values() if found == {k: v for k, v in files.items() if k != MARKS[1]}]
        assert same, f"a mix: {sorted(found)}"
        return "one without its manifest"


def without_staging(out):
    return {name: data for name, data in contents(out).items() if not name.startswith(STAGING)}


def record(folder, *, old):
    """Records a run into a fresh directory, or over an artifact of another format with as many shards."""
    source = write_checkpoint(folder / "source", shards=3)
    (source / "tokenizer.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "a.jinja").write_text("a")
    out = folder / "disk" / "out"
    out.parent.mkdir()
    if old:
        (source / "vocab.txt").write_text("old")
        quantize(source, out, options("fp4"))
        (source / "vocab.txt").unlink()
    before = contents(out)
    recorder = Recorder(out.parent)
    with recorder.recording():
        quantize(source, out, options(), overwrite=old)
    assert len([name for name in contents(out) if name.endswith(".safetensors")]) == 3
    return Recording(source, recorder, contents(out), before)


def replay(recording, where, sample, seeds, rng):
    """Loses power after a sample of the steps, at each in the worst way and by so many seeds."""
    for after in sorted(rng.sample(range(len(recording.recorder.steps) + 1), sample)):
        recording.lose_power(where, after, nothing_unsynced)
        for seed in range(seeds):
            recording.lose_power(where, after, some_of(f"{after}/{seed}"))


@pytest.fixture(scope="module", params=[False, True], ids=["fresh", "overwrite"])
def recording(request, tmp_path_factory):
    return record(tmp_path_factory.mktemp("recorded"), old=request.param)


def test_the_recorder_knows_every_byte(recording, tmp_path):
    recorder = recording.recorder
    everything = after_power_loss(recorder.start, recorder.steps, lambda step, half: 1.0).store(tmp_path / "disk")
    assert contents(everything) == contents(recorder.root)


def test_what_is_said_to_be_complete_survives(recording, tmp_path):
    recorder = recording.recorder
    kept = after_power_loss(recorder.start, recorder.steps, nothing_unsynced).store(tmp_path / "disk")
    assert contents(kept) == contents(recorder.root)


def test_the_directory_is_resumable_after_some_steps(recording, tmp_path):
    replay(recording, tmp_path / "disk", 12, 1, random.Random(6))


def test_at_no_step_is_there_a_loadable_mix(recording, tmp_path):
    """Every step of publishing, in many ways."""
    steps = recording.recorder.steps
    first = max(index for index, step in enumerate(steps) if step.kind == "link") - 1
    for after in range(first, len(steps) + 1):
        for kept in (nothing_unsynced, *(some_of(f"{after}/{seed}") for seed in range(8))):
            recording.lose_power(tmp_path / "disk", after, kept, resumed=False)
    assert recording.states["the new"]
    assert recording.states["none"]


def test_a_second_loss_while_the_rest_is_made(recording, tmp_path):
    """A run that goes on after a loss is recorded, too, and loses power again."""
    rng = random.Random(7)
    steps = len(recording.recorder.steps)
    for after in rng.sample(range(steps // 2, steps), 3):
        disk = after_power_loss(recording.recorder.start, recording.recorder.steps[:after], some_of(after))
        out = disk.store(tmp_path / f"first-{after}") / "out"
        if recording.state_of(out) == "the new":
            continue
        recorder = Recorder(out.parent)
        with recorder.recording():
            quantize(recording.source, out, options(), overwrite=bool(recording.old))
        again = Recording(recording.source, recorder, recording.made, recording.old)
        replay(again, tmp_path / "second", 3, 1, rng)


def test_a_file_that_was_not_synced_is_torn_in_the_model(tmp_path):
    """The model itself: an unsynced rename may be there while the data is not."""
    (tmp_path / "disk").mkdir()
    recorder = Recorder(tmp_path / "disk")
    with recorder.recording():
        part = tmp_path / "disk" / "config.json.part"
        with part.open("xb") as file:
            file.write(json.dumps({"a": 1}).encode())
        part.replace(tmp_path / "disk" / "config.json")
    found = set()
    for seed in range(60):
        disk = after_power_loss(recorder.start, recorder.steps, some_of(seed))
        found.add(tuple((name, bytes(disk.files[node])) for name, node in sorted(disk.folders[0].items())))
    assert () in found
    for data in (b"", b'{"a"', b'{"a": 1}'):
        assert (("config.json", data),) in found
