"""`python -m surogate_load` is `surogate-load`."""

from surogate_load.cli import main

main(prog_name="surogate-load")
