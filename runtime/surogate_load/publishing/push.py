"""Uploads an artifact to the Hub, whole or not at all, with a model card."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surogate_formats.artifact import Artifact
from surogate_formats.hub_text import quiet_hub
from surogate_formats.manifest import MANIFEST_NAME
from surogate_load.publishing.card import CARD, PLOT, make_card
from surogate_load.publishing.errors import RepositoryTakenError, check_access, check_name, upload_errors
from surogate_load.publishing.plot import error_plot
from surogate_load.publishing.source import base_of, read_source_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OURS = ("model*.safetensors", "model.safetensors.index.json", "hf_quant_config.json", MANIFEST_NAME, PLOT)
"""Files of an earlier artifact that go where a new one doesn't have them."""

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Push:
    """How to push.

    Attributes:
        private: a repository that is made is private.
        create_pr: open a pull request instead of a commit on the default branch.
        commit_message: the commit's first line; None says what the artifact is.
        token: for the Hub; None takes HF_TOKEN, else the stored login.
        base_model: the repository that the artifact was made from; None takes the recorded source, if it is one.
        source_card: the source's model card; None downloads it from the base model.
    """

    private: bool = False
    create_pr: bool = False
    commit_message: str | None = None
    token: str | None = None
    base_model: str | None = None
    source_card: str | Path | None = None


def push(artifact: str | Path, repo: str, how: Push | None = None, say: Say = lambda line: None) -> str:
    """Verifies an artifact and uploads it in one commit: until that, nothing of it can be seen.

    Files go up before the commit; a push that broke off goes on where it was, when it is called again.

    Args:
        artifact: its directory.
        repo: the repository, such as `me/model`; it is made if it doesn't exist.
        how: see `Push`.
        say: told what the user should know, a line each.

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        ArtifactError, CheckpointError: it is no artifact of surogate-quantize, not complete, or changed.
        RepositoryNameError, NoWriteAccessError: nothing was read or sent.
        RepositoryTakenError: the repository holds something else.
        SurogateError: see `surogate_load.publishing.errors`.
    """
    from huggingface_hub import HfApi

    how = how or Push()
    api = HfApi(token=how.token, library_name="surogate-quant")
    for name in (repo, how.base_model):
        if name is not None:
            check_name(name)
    with Artifact.open(artifact) as opened, quiet_hub(bars=sys.stderr.isatty()):
        check_access(repo, how.token)
        opened.verify()
        names = [MANIFEST_NAME, *opened.manifest.sidecars, *(file.name for file in opened.checkpoint.files)]
        lines: list[str] = []
        card = _card(opened, repo, api, how, lines.append)
        with upload_errors(repo):
            api.create_repo(repo, private=how.private, exist_ok=True)
            there = api.model_info(repo)
        _check_taken(repo, there)
        if how.private and there.private is False:
            lines.append(f"{repo}: exists already, and is public")
        for line in lines:  # not before all that may be refused was
            say(line)
        with upload_errors(repo):
            files = {**{name: opened.path / name for name in names}, **card}
            return _commit(api, repo, there, files, _message(opened), how)


def _card(opened: Artifact, repo: str, api: HfApi, how: Push, say: Say) -> dict[str, bytes | Path]:
    """README.md and its picture: what the user wrote, or else ours."""
    own = opened.path / CARD
    if own.is_file():
        say(f"{own}: is uploaded as it is, and no card is made")
        return {CARD: own}
    base = base_of(opened.manifest, how.base_model)
    if base is None:
        say(f"the source {opened.manifest.source} is no repository's name, so the card names no base model; "
            "--base-model org/model does")  # fmt: skip
    source_card = read_source_card(base, how.source_card, api, say)
    plot = error_plot(opened.manifest)
    if plot is None:
        say("no error plot: pip install 'surogate-quant[card]' draws one")
    card = make_card(opened, repo, base, source_card, plot=plot is not None)
    return {CARD: card.encode(), **({PLOT: plot} if plot else {})}


def _check_taken(repo: str, there: Any) -> None:
    names = {entry.rfilename for entry in there.siblings or ()}
    weights = sorted(name for name in names if name.endswith(_WEIGHTS))
    if weights and MANIFEST_NAME not in names:
        raise RepositoryTakenError(
            f"{repo}: holds {weights[0]} and no {MANIFEST_NAME}, so it is no artifact's; choose another repository"
        )


def _message(opened: Artifact) -> str:
    return f"{opened.manifest.source} in {opened.format.name}, layout {opened.layout.name}"


def _commit(api: HfApi, repo: str, there: Any, files: dict[str, bytes | Path], message: str, how: Push) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    stale = [
        entry.rfilename
        for entry in there.siblings or ()
        if entry.rfilename not in files and any(fnmatch.fnmatchcase(entry.rfilename, pattern) for pattern in OURS)
    ]
    done = api.create_commit(
        repo,
        [
            *(CommitOperationAdd(name, content) for name, content in sorted(files.items())),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=how.commit_message or message,
        create_pr=how.create_pr,
        parent_commit=there.sha,
    )
    return str(done.pr_url) if how.create_pr else f"{api.endpoint}/{repo}"
