"""What can stand in the way of an upload, one class per cause; huggingface_hub's errors in one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from surogate_formats.checkpoint.errors import shown
from surogate_formats.errors import SurogateError, UsageError
from surogate_formats.hub_text import reason

_AGAIN = "the same command again sends only what hasn't arrived"
_GIVE_TOKEN = "give one with write access: --token, HF_TOKEN or hf auth login"


class RepositoryNameError(UsageError):
    """A text that can't be a repository's name."""


class RepositoryTakenError(UsageError):
    """The repository holds weights that are no artifact: an upload would mix with or hide them."""


class NoWriteAccessError(SurogateError):
    """There is no token, the Hub doesn't know it, or it may not write there."""


class RepositoryChangedError(SurogateError):
    """Somebody else has changed the repository during the upload."""


class UploadLimitedError(SurogateError):
    """The Hub takes no more requests for now."""


class UploadFailedError(SurogateError):
    """No answer, a broken connection, or an error on the Hub's side."""


class UploadRefusedError(SurogateError):
    """Any other refusal of the Hub, or of huggingface_hub."""


class UnreadableCardError(UsageError):
    """The source's model card, as it was given, can't be read."""


def check_name(repo: str) -> None:
    """Raises `RepositoryNameError` for a text that can't be a repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise _translated(error, repo) from error


def check_access(repo: str, token: str | None) -> None:
    """Refuses, before an artifact is read, an upload that is sure to fail.

    Raises:
        NoWriteAccessError: there is no token.
        UploadFailedError: offline.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        raise _translated(OfflineModeIsEnabled(), repo)
    if not (token or get_token()):
        raise NoWriteAccessError(f"{repo}: no token; {_GIVE_TOKEN}")


@contextmanager
def upload_errors(repo: str) -> Iterator[None]:
    """Says in our words, and without a token, what huggingface_hub raises in the block.

    Raises:
        SurogateError: one of the classes of this module.
    """
    try:
        yield
    except SurogateError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise _translated(error, repo) from error
    except Exception as error:
        from huggingface_hub.errors import HfHubHTTPError

        # httpx in huggingface_hub 1, httpx2 in 2: whatever the base of both kinds of error is.
        if not isinstance(error, HfHubHTTPError.__bases__[0]):
            raise
        raise _translated(error, repo) from error


def _translated(error: BaseException, repo: str) -> SurogateError:
    from huggingface_hub import errors as hub

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # one file's upload, in a thread
        return _translated(error.__cause__, repo)
    if isinstance(error, hub.HFValidationError):
        return RepositoryNameError(f"{shown(repo)}: no name on the Hub, which looks like me/model")
    if isinstance(error, hub.OfflineModeIsEnabled):
        return UploadFailedError(f"{repo}: offline (HF_HUB_OFFLINE); unset that and push again")
    if isinstance(error, hub.HfHubHTTPError):
        return _answered(error, repo)
    if isinstance(error, ValueError | RuntimeError):
        return UploadRefusedError(f"{repo}: nothing was published ({reason(error)})")
    return UploadFailedError(f"{repo}: the Hub can't be reached ({reason(error)}); nothing was published, and {_AGAIN}")


def _answered(error: Exception, repo: str) -> SurogateError:
    from huggingface_hub.errors import RepositoryNotFoundError

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return NoWriteAccessError(f"{repo}: the Hub refuses the token, or there is none ({status}); {_GIVE_TOKEN}")
    if status == 429:
        seconds = getattr(response, "headers", {}).get("Retry-After")
        when = f"in {seconds} seconds" if str(seconds).isdecimal() else "later"
        return UploadLimitedError(f"{repo}: the Hub takes no more requests for now (429); {when}, {_AGAIN}")
    if status == 412:
        return RepositoryChangedError(f"{repo}: was changed meanwhile; look at it, then push again")
    if status >= 500:
        return UploadFailedError(f"{repo}: the Hub fails ({status}); nothing was published, and {_AGAIN}")
    return UploadRefusedError(f"{repo}: the Hub refuses, and nothing was published ({reason(error)})")
