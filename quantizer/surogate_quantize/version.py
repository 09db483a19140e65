"""The tool's version, shared with whoever only reads artifacts."""

from surogate_formats.version import VERSION

__all__ = ["VERSION"]
