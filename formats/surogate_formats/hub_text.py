"""Names on the Hub, and what its client raises as a user reads it: one class per cause, one line, no token."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from surogate_formats.checkpoint.errors import shown
from surogate_formats.errors import SurogateError, UsageError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""What may be the name of a repository: owner/name."""

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}|Bearer \S+")
_GIVE_TOKEN = "`token`, HF_TOKEN or hf auth login"


class HubNameError(UsageError):
    """A text that looks like a repository's name, and can't be one."""


class RevisionOfDirectoryError(UsageError):
    """A revision was asked of a model that is a local directory."""


class ModelNotFoundError(SurogateError):
    """Neither a directory nor a repository that this token may see has the model's name."""


class GatedModelError(SurogateError):
    """The repository's owner gives access on request, and this account has none."""


class TokenRefusedError(SurogateError):
    """The Hub doesn't know the token, or the token doesn't allow this."""


class RevisionNotFoundError(SurogateError):
    """The repository has no such branch, tag or commit."""


class NotCachedError(SurogateError):
    """Offline, and the cache doesn't hold the model."""


class RateLimitedError(SurogateError):
    """The Hub takes no more requests for now."""


class HubUnreachableError(SurogateError):
    """No answer, a broken connection that wasn't resumed, or an error on the Hub's side."""


class HubRefusedError(SurogateError):
    """Any other refusal of the Hub, or of huggingface_hub."""


class FolderNotWritableError(SurogateError):
    """A folder that files are downloaded to can't be written."""


class DownloadDiskFullError(SurogateError):
    """The disk has no room for a download."""


def reason(error: BaseException) -> str:
    """An error's first line, printable and without a token."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return shown(_TOKEN.sub("<token>", text))


@contextmanager
def quiet_hub(*, bars: bool) -> Iterator[None]:
    """Keeps huggingface_hub's warnings off the terminal, and its bars unless `bars`: errors are ours."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level, had_bars = get_verbosity(), not are_progress_bars_disabled()
    if level == logging.WARNING:  # the default
        set_verbosity(logging.ERROR)
    if not bars:
        disable_progress_bars()
    try:
        yield
    finally:
        set_verbosity(level)
        if had_bars:
            enable_progress_bars()


@contextmanager
def named_for(folder: str, name: str) -> Iterator[None]:
    """Puts the repository's name into errors in place of a folder that the user has never seen."""
    try:
        yield
    except SurogateError as error:
        if folder not in str(error):
            raise
        raise type(error)(str(error).replace(folder, name)) from error


@contextmanager
def hub_errors(repo: str, revision: str | None = None, *, lead: str = "") -> Iterator[None]:
    """Says in our words what huggingface_hub raises in the block.

    Args:
        repo: what the messages name.
        revision: the one that is asked for.
        lead: said first where the Hub or the cache can't answer.

    Raises:
        SurogateError: one of the classes of this module.
    """
    try:
        yield
    except SurogateError:
        raise
    except Exception as error:
        known = translated(error, repo, revision, lead)
        if known is None:
            raise
        raise known from error


def translated(error: BaseException, repo: str, revision: str | None, lead: str = "") -> SurogateError | None:
    """The error in our words; None if it is no error of the Hub's, of the connection's or of the disk's."""
    from huggingface_hub import errors as hub

    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):  # says less than what it comes from
        return translated(cause, repo, revision, lead)
    known: SurogateError | None = None
    if isinstance(error, hub.OfflineModeIsEnabled | hub.LocalEntryNotFoundError):
        known = not_cached(repo, lead=lead)
    elif isinstance(error, hub.HFValidationError):
        known = HubNameError(f"{shown(repo)}: no such directory, and no name on the Hub, which looks like org/model")
    elif isinstance(error, hub.RevisionNotFoundError):
        known = RevisionNotFoundError(f"{repo}: has no revision {shown(revision)!r} on the Hub; check `revision`")
    elif isinstance(error, hub.HfHubHTTPError):
        known = _answered(error, repo)
    # httpx in huggingface_hub 1, httpx2 in 2: whatever the base of both kinds of error is.
    elif isinstance(error, (hub.HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)):
        known = HubUnreachableError(
            f"{repo}: {lead}the Hub can't be reached ({reason(error)}); run it again, or set HF_HUB_OFFLINE=1 to use "
            "the cache"
        )
    elif isinstance(error, OSError):
        known = _from_disk(error, repo)
    elif isinstance(error, ValueError | RuntimeError | hub.XetDownloadError):
        known = HubRefusedError(f"{repo}: can't be downloaded ({reason(error)})")
    return known


def not_cached(repo: str, file: str = "it", *, lead: str = "") -> NotCachedError:
    """The error for a model, or a file of it, that is needed offline and not in the cache."""
    return NotCachedError(
        f"{repo}: {lead}offline (HF_HUB_OFFLINE), and {file} isn't in the cache; go online, or hf download {repo} there"
    )


def _answered(error: Exception, repo: str) -> SurogateError:
    from huggingface_hub import errors as hub

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if isinstance(error, hub.GatedRepoError):
        return GatedModelError(
            f"{repo}: gated; accept its conditions on its page on the Hub, then give a token of that account "
            f"({_GIVE_TOKEN})"
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"{repo}: no such directory, and no such model on the Hub, or a private one; check the name, or give a "
            f"token that may read it ({_GIVE_TOKEN})"
        )
    if status in (401, 403):
        return TokenRefusedError(f"{repo}: the Hub refuses the token ({status}); give another ({_GIVE_TOKEN})")
    if status == 429:
        seconds = getattr(response, "headers", {}).get("Retry-After")
        when = f"in {seconds} seconds" if str(seconds).isdecimal() else "later"
        return RateLimitedError(f"{repo}: the Hub takes no more requests for now (429); run it again {when}")
    if status >= 500:
        return HubUnreachableError(f"{repo}: the Hub fails ({status}); run it again later")
    return HubRefusedError(f"{repo}: the Hub refuses ({reason(error)})")


def _from_disk(error: OSError, repo: str) -> SurogateError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({shown(error.filename)})" if error.filename else ""
        return DownloadDiskFullError(
            f"{repo}: the disk is full while downloading{where}; free some space, or choose another disk"
        )
    if error.errno is None:  # huggingface_hub's own, for a size that isn't the promised one
        return HubUnreachableError(f"{repo}: the download broke off ({reason(error)}); run it again")
    return FolderNotWritableError(
        f"{repo}: {shown(error.filename)}: {error.strerror}; check its permissions, or HF_HOME"
    )
