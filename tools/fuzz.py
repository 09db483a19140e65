"""Fuzzes one reader of strangers' files with atheris: `python tools/fuzz.py TARGET --runs N --seconds S`.

Targets are those of tests/attacks/fuzz_targets.py. It starts from tests/attacks/corpora/TARGET.jsonl, and fails at any
exception but a SurogateError of one printable line, at 5 s or 1 GB for one input. With `--keep N` the N shortest new
inputs that reached new code are written there, one JSON text a line, each character a byte.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("formats", "quantizer", "runtime", "tests")]
CORPORA = ROOT / "tests" / "attacks" / "corpora"
LONGEST = 1 << 13
"""Bytes of an input that is kept."""


def main() -> None:
    """Runs libFuzzer, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=["surogate_formats", "yaml"]):
        from attacks import fuzz_targets
    from attacks.fuzz_mutations import mutated

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=fuzz_targets.TARGETS)
    parser.add_argument("--runs", type=int, default=-1)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for number, text in enumerate(read_corpus(given.target)):
        (folder / f"seed-{number}").write_bytes(text)
    options = [f"-runs={given.runs}", f"-max_total_time={given.seconds}", "-timeout=5", "-rss_limit_mb=1024"]
    options += [f"-max_len={1 << 16}", f"-artifact_prefix={folder}/crash-", "-print_final_stats=1"]

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        changed = mutated(given.target, data, seed) if seed % 2 else None
        return atheris.Mutate(data, longest) if changed is None else changed[:longest]

    def run(data: bytes) -> None:
        fuzz_targets.run(given.target, data)

    atheris.Setup([sys.argv[0], *options, str(folder)], run, custom_mutator=mutate)
    # libFuzzer leaves by _exit: what it found is kept by a process that outlives it.
    child = os.fork()
    if child == 0:
        atheris.Fuzz()
    _, status = os.waitpid(child, 0)
    if status == 0:
        keep(given.target, folder, given.keep)
    sys.stdout.flush()
    os._exit(min(status, 1))  # atheris has set itself up here too, and would wait for what never runs


def read_corpus(target: str) -> list[bytes]:
    """The saved inputs of a target."""
    lines = (CORPORA / f"{target}.jsonl").read_text("ascii").splitlines()
    return [json.loads(line).encode("latin-1") for line in lines]


def keep(target: str, folder: Path, count: int) -> None:
    """Adds the shortest new inputs to the saved ones."""
    known = read_corpus(target)
    found = [path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(("seed-", "crash-"))]
    new = sorted((data for data in set(found) - set(known) if len(data) <= LONGEST), key=lambda data: (len(data), data))
    lines = [json.dumps(data.decode("latin-1")) for data in [*known, *new[:count]]]
    (CORPORA / f"{target}.jsonl").write_text("\n".join(lines) + "\n", "ascii")
    print(f"{len(known)} inputs were known, {min(count, len(new))} are new")


if __name__ == "__main__":
    main()
