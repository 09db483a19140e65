"""Calibrated codes: the same bytes and layout, and codes that keep the model's output on text.

Needs torch, transformers and accelerate (extra `train`), and is imported where a run calibrates alone.
"""
