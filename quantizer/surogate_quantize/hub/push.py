"""`--push-to-hub`: `surogate-load push` as a process of its own; the runtime knows who reads which layout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surogate_formats.checkpoint.errors import shown
from surogate_formats.errors import UsageError

if TYPE_CHECKING:
    from surogate_quantize.console import Out

CARD = "README.md"
"""The model card's name on the Hub."""

_FLAGS = ("private", "create_pr", "commit_message")


class PushOptionError(UsageError):
    """An option of `--push-to-hub` without it, or a push that is sure to fail."""


def check_push(arguments: Mapping[str, Any]) -> None:
    """Refuses, before hours of work, a push that can't come off.

    Raises:
        PushOptionError: see the class.
    """
    repo = arguments["push_to_hub"]
    if repo is None:
        given = next((name for name in _FLAGS if arguments[name]), None)
        if given is not None:
            raise PushOptionError(f"`{given}` says how to push; add --push-to-hub REPO, or leave it out")
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise PushOptionError(f"--push-to-hub {shown(repo)}: no name on the Hub, which looks like me/model") from None
    if constants.HF_HUB_OFFLINE:
        raise PushOptionError("--push-to-hub: offline (HF_HUB_OFFLINE); unset that, or push later with surogate-load")
    if not (arguments["token"] or get_token()):
        raise PushOptionError("--push-to-hub: no token; give `token`, set HF_TOKEN, or run hf auth login")


def push(out: Out, model: str, arguments: Mapping[str, Any]) -> None:
    """Uploads the artifact in `--out`; ends the process with the other one's status if that fails.

    The token goes by the environment: everybody may read a command line.
    """
    command = [sys.executable, "-m", "surogate_load", "push", arguments["out"], arguments["push_to_hub"]]
    command += [f"--{name.replace('_', '-')}" for name in ("private", "create_pr") if arguments[name]]
    if arguments["commit_message"]:
        command += ["--commit-message", arguments["commit_message"]]
    if (card := Path(model) / CARD).is_file():
        command += ["--source-card", str(card)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if arguments["token"]:
        environment["HF_TOKEN"] = arguments["token"]
    sys.stdout.flush()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    out.note(f"pushed to {done.stdout.strip()}")
