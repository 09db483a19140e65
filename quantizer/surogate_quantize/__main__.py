"""`python -m surogate_quantize`."""

from surogate_quantize.cli import main

main(prog_name="surogate-quantize")
