"""What calibration is asked for; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from surogate_formats.codes_in_words import CODES
from surogate_formats.errors import UsageError

ROW = 512
"""Tokens of a row of calibration text, where the model takes so many."""

TOKENS_EACH_COLUMN = 10
"""Tokens of calibration text for each column of the widest weight, by default."""

LEAST_TOKENS = 28 * ROW

BATCH = 4 * ROW
"""By default there are whole batches of text: the one that is held out has all the rows that it can have."""


class CalibrationOptionsError(UsageError):
    """Options of calibration that don't go together."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What calibration is asked for.

    Attributes:
        text: a file of text (`.txt`, or `.jsonl` with a field `text` or `input_ids`); None: the model writes it.
        tokens: how many; None: by the widest weight.
        seed: of the text that the model writes.
        adapter_joint: codes and adapter are chosen together: better with the adapter, worse without.
    """

    text: str | None = None
    tokens: int | None = None
    seed: int = 0
    adapter_joint: bool = False

    def tokens_for(self, widest: int) -> int:
        """How many tokens, for weights of up to `widest` columns; whole rows, and whole batches by default."""
        wanted, unit = (self.tokens, ROW) if self.tokens else (max(LEAST_TOKENS, TOKENS_EACH_COLUMN * widest), BATCH)
        return -(-wanted // unit) * unit


def settle_calibration(
    codes: str, text: str | None, tokens: int | None, adapter_init: int | None, adapter_joint: bool = False
) -> CalibrationOptions:
    """The options of calibration, if they go together.

    Raises:
        CalibrationOptionsError: `codes` is none that there is, or there are options that it doesn't take.
    """
    if codes not in CODES:
        raise CalibrationOptionsError(f"`codes` is {codes!r}; choose one of {', '.join(CODES)}")
    given = {"calibration_text": text, "calibration_tokens": tokens}
    for name, value in given.items():
        if value is not None and codes != "calibrated" and adapter_init is None:
            raise CalibrationOptionsError(
                f"`{name}` is for `codes='calibrated'` and for `adapter_init`, and neither is given; leave it out"
            )
    for name, number in {"calibration_tokens": tokens, "adapter_init": adapter_init}.items():
        if number is not None and number < 1:
            raise CalibrationOptionsError(f"`{name}` is {number}: must be positive")
    if adapter_joint and (codes != "calibrated" or adapter_init is None):
        raise CalibrationOptionsError("`adapter_joint` is for `codes='calibrated'` with `adapter_init`; give both")
    return CalibrationOptions(text, tokens, adapter_joint=adapter_joint)
