"""Calibrated codes: the same bytes and layout, and codes that keep the model's output on text.

Needs torch and transformers (extra `calibrate`); nothing else of the quantizer imports this package.
"""
