"""The one place of the version, of which pyproject.toml makes the distribution's; it is recorded in artifacts."""

VERSION = "0.1.0"
