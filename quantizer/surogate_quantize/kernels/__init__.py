"""CPU kernels in numba, byte-equal to the numpy definitions in `surogate_formats`.

Each kernel works on one piece of a weight, releases the GIL, and allocates only scratch of the size of a cache. Pieces are cut at
fixed places, so that neither the bytes nor the error sums depend on the number of threads.

Float arithmetic here is float32, operation by operation; numba neither contracts nor reorders it unless asked to (fastmath).
"""
