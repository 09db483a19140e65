"""Runs every attack of tests/attacks and prints what its refusal costs; exit 1 above 100 ms or 100 MB, or if unrefused.

Usage: python tools/attack_costs.py [--table]

The time is CPU time of this process, the least of three runs; the memory is the most that was allocated at once, as
tracemalloc counts it. `--table` prints the table of tests/attacks/README.md instead.
"""

import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("formats", "quantizer", "runtime", "tests")]

from attacks.all_attacks import ATTACKS, table  # noqa: E402
from attacks.attack import COMMANDS, Attack  # noqa: E402

SECONDS, MEGABYTES = 0.1, 100
RUNS = 3


def cost(attack: Attack) -> tuple[float, float]:
    """CPU seconds and megabytes of one refusal."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "parent", "model")
        directory.mkdir(parents=True)
        attack.make(directory)
        seconds = []
        for _ in range(RUNS):
            start = time.process_time()
            refuse(attack, directory)
            seconds.append(time.process_time() - start)
        tracemalloc.start()
        refuse(attack, directory)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return min(seconds), peak / 1e6


def refuse(attack: Attack, directory: Path) -> None:
    """Runs the attacked command; anything but the attack's error ends the tool."""
    try:
        COMMANDS[attack.command](directory)
    except attack.error:
        return
    raise SystemExit(f"not refused: {attack}")


def main() -> None:
    """Prints the slowest and the largest."""
    if "--table" in sys.argv[1:]:
        print(table())
        return
    costs = {name: cost(attack) for name, attack in ATTACKS.items()}
    print(f"{len(costs)} attacks, every one refused with its own error")
    for what, unit, factor, column in (("slowest", "ms", 1e3, 0), ("largest", "MB", 1, 1)):
        print(f"{what}:")
        for name in sorted(costs, key=lambda name: -costs[name][column])[:10]:
            print(f"  {costs[name][column] * factor:8.1f} {unit}  {name}")
    if any(seconds > SECONDS or megabytes > MEGABYTES for seconds, megabytes in costs.values()):
        sys.exit(f"above {SECONDS * 1e3:.0f} ms or {MEGABYTES} MB")


if __name__ == "__main__":
    main()
