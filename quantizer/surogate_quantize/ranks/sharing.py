"""One output directory for all ranks: the first holds it, the others prove that they see the same."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from surogate_quantize.ranks.errors import NotSharedError
from surogate_quantize.ranks.team import Team
from surogate_quantize.run_identity import Identity
from surogate_quantize.staging import Staging, staged
from surogate_quantize.syncing import sync_directory, write_synced

PATIENCE = 30.0
"""Seconds until a file of one machine is given up on another: network file systems remember for a while what wasn't
there."""


@contextmanager
def staged_together(team: Team, out: Path, identity: Identity, shards: int, *, overwrite: bool) -> Iterator[Staging]:
    """As `staged`, which the first rank does for all; the artifact is complete when the block has ended on any rank.

    Raises:
        NotSharedError: a rank doesn't see the first one's directory.
        SurogateError: see `staged` and `Team.together`.
    """
    staging, nonce = Staging(out, shards), f"{secrets.token_hex(16)}.nonce"
    with ExitStack() as stack:

        def enter() -> str:
            if team.rank == 0:
                stack.enter_context(staged(staging, identity, overwrite=overwrite))
                if team.size > 1:
                    write_synced(staging.path / nonce, b"")
                    sync_directory(staging.path)
            return nonce

        path = staging.path / team.together(enter)[0]
        team.together(lambda: _await(path) if team.rank else None)
        yield staging
        team.together(stack.pop_all().close)


def _await(path: Path) -> None:
    started = time.monotonic()
    while not path.exists():
        if time.monotonic() - started > PATIENCE:
            raise NotSharedError(
                f"`out` {path.parent.parent}: what the first rank has written there isn't seen here; give a directory "
                "of a file system that all machines share"
            )
        time.sleep(0.1)
