"""`python -m surogate_quantize`."""

from surogate_quantize.entry import main

main()
