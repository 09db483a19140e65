"""Names on the Hub, and errors of its client as they may be shown."""

from __future__ import annotations

import re

from surogate_formats.checkpoint.errors import shown

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""What may be the name of a repository: owner/name."""

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}|Bearer \S+")


def reason(error: BaseException) -> str:
    """An error's first line, printable and without a token."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return shown(_TOKEN.sub("<token>", text))
