"""What the command `surogate-quantize` starts: it answers a signal in one line from the first import on."""

from __future__ import annotations

from surogate_quantize.interruption import one_line_at_the_end


def main() -> None:
    """Runs the command line."""
    with one_line_at_the_end():
        from surogate_quantize.cli import main as command
        from surogate_quantize.heap import return_large_blocks

        return_large_blocks()
        command(prog_name="surogate-quantize")
