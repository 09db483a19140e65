"""Artifacts to the Hub: verified, described by a model card, pushed in one commit."""
