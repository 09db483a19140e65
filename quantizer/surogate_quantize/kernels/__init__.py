"""CPU kernels in numba, byte-equal to the numpy definitions in `surogate_formats`.

Each kernel works on one piece of a weight, releases the GIL, and allocates only scratch of the size of a cache. Pieces
are cut at fixed places, so that neither the bytes nor the error sums depend on the number of threads.

The hot loops run over about a thousand values, from index 0 up, without a branch and without 64-bit integers: such
loops the compiler turns into vector code. (numba makes results of narrow integers 64 bits wide, hence the casts.)
Compiled kernels are kept on disk, and numba looks at the age of a kernel's own file alone: after a change to a file
that kernels call into, delete `__pycache__`.

Float arithmetic here is float32, operation by operation; numba neither contracts nor reorders it unless asked to
(fastmath).
"""
