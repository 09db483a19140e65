"""What can go wrong between ranks."""

from __future__ import annotations

from surogate_formats.errors import SurogateError


class RankError(SurogateError):
    """The ranks of a run can't make an artifact together."""


class RankLostError(RankError):
    """A rank has died, or can't be reached."""


class StoppedByTeamError(RankError):
    """This rank stops because another has failed, which then says why."""


class NotSharedError(RankError):
    """A rank doesn't see the output directory of the first one."""


class DifferentPlansError(RankError):
    """Two ranks have been asked for different things, or see different sources."""
