"""What can go wrong while a shard comes from the Hub, beside `surogate_formats.hub_text`; one class per cause."""

from __future__ import annotations

from surogate_formats.errors import CheckpointError, SurogateError, UsageError


class DamagedDownloadError(CheckpointError):
    """A downloaded or cached shard isn't, byte by byte, the file that the Hub has."""


class StoppedError(SurogateError):
    """The run ends; a download that another thread waits for is given up."""


class UnknownHashError(UsageError):
    """The hash of a file's bytes is asked for, and the Hub has none."""
