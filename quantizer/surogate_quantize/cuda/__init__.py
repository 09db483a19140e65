"""The CUDA engine: CuPy compiles and launches its kernels, and holds its memory; nothing of torch is used.

CuPy is imported when an engine is made, and not before. The kernels do what those in `surogate_quantize.kernels` do,
operation by operation, so that no byte of an artifact and no figure of its manifest depends on the device.
"""
