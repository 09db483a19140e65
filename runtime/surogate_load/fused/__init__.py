"""Layers that read the same activations (q, k, v; gate, up) multiplied as one."""
