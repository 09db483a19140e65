"""The tool's version: part of what determines an artifact's bytes."""

VERSION = "0.1.0"
