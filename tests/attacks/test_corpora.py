"""Every input that a fuzzer has found worth keeping: read, or refused in one line, at no cost in memory."""

import json
import tracemalloc
from pathlib import Path

import pytest
from attacks.fuzz_targets import TARGETS, run

CORPORA = Path(__file__).with_name("corpora")
PEAK = 100_000_000


def test_every_target_has_a_corpus() -> None:
    assert {path.stem for path in CORPORA.iterdir()} == TARGETS.keys()


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target: str) -> None:
    lines = (CORPORA / f"{target}.jsonl").read_text("ascii").splitlines()
    assert lines
    tracemalloc.start()
    try:
        for line in lines:
            run(target, json.loads(line).encode("latin-1"))
        assert tracemalloc.get_traced_memory()[1] < PEAK
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_lets_what_is_right_through(target: str) -> None:
    """Else it would refuse everything at its door, and fuzzing it would show nothing."""
    lines = (CORPORA / f"{target}.jsonl").read_text("ascii").splitlines()
    assert any(accepted(target, json.loads(line).encode("latin-1")) for line in lines)


def accepted(target: str, data: bytes) -> bool:
    try:
        TARGETS[target](data)
    except Exception:
        return False
    return True
