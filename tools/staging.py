"""Writing a checkpoint directory so that a half-written one is never taken for a whole one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = "config.json"
"""The file that is moved into place last: a directory that has it is complete."""


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yields an empty directory beside `out`; on success its files are moved into `out`, `config.json` last.

    Where the body raises, `out` stays as it was and the staged files are removed. Only plain files are moved.

    Args:
        out: the directory to publish into; it and its parents are made.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    # The same file system as `out`, or a move would be a copy and not atomic.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as directory:
        staging = Path(directory)
        yield staging
        out.mkdir(exist_ok=True)
        for file in sorted(staging.iterdir(), key=lambda path: path.name == MARKER):
            file.replace(out / file.name)
