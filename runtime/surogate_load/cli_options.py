"""What the commands of `surogate-load` have in common: options, names on the Hub, errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import click

P = ParamSpec("P")

_FLAGS = {"`revision`": "--revision", "`token`": "--token"}
"""Parameters as errors name them, and as the command line does."""


def known_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Prints an error of ours as one line and exits: 1, or 2 where the request was wrong; 130 after Ctrl-C."""

    @wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        from surogate_formats.errors import SurogateError, UsageError

        try:
            command(*args, **kwargs)
        except SurogateError as error:
            if os.environ.get("SUROGATE_DEBUG"):
                raise
            text = str(error)
            for parameter, flag in _FLAGS.items():
                text = text.replace(parameter, flag)
            click.echo(f"Error: {text}", err=True)
            sys.exit(2 if isinstance(error, UsageError) else 1)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            sys.exit(130)  # as shells have it for SIGINT; click's own 1 would be that of a damaged artifact

    return guarded


TOKEN = click.option("--token", help="For the Hub.  [default: HF_TOKEN, else the login of hf auth login]")
REVISION = click.option("--revision", metavar="REV", help="Branch, tag or commit, where ARTIFACT is on the Hub.")


def _check_others(out: str | None = None, adapter: str | None = None, **_: Any) -> None:
    """What needn't wait for a download."""
    if out is not None:
        from surogate_load.export.checkpoint import check_absent

        check_absent(Path(out))
    if adapter not in (None, "init"):
        from surogate_load.saved_adapter import check_saved

        check_saved(adapter)


def on_the_hub(command: Callable[..., None]) -> Callable[..., None]:
    """Lets ARTIFACT be a name on the Hub: the command gets the directory of its files in the Hub's cache."""

    @REVISION
    @TOKEN
    @known_errors
    @wraps(command)
    def located(artifact: str, revision: str | None, token: str | None, **others: Any) -> None:
        from surogate_load.local import local_directory

        _check_others(**others)
        command(str(local_directory(artifact, revision, token)), **others)

    return located


OUT = click.option("--out", required=True, type=click.Path(), help="Directory to write; must not exist.")
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of every floating-point tensor.  [default: as in the source]",
)


def print_rows(rows: Mapping[str, Any]) -> None:
    """Prints values by title, a list's below each other."""
    width = max(map(len, rows))
    for key, value in rows.items():
        for index, line in enumerate(value if isinstance(value, list) else [value]):
            click.echo(f"{key if index == 0 else '':{width}}  {line}")
