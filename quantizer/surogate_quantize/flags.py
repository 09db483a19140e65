"""Messages of the Python API in the words of the command line.

The API names its parameters in backticks, with a value where there is one to give: `two_d=False`. The command line
prints the flag that stands for it: --1d.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import click

_PARAMETER = re.compile(r"`(?P<name>\w+)(?:='?(?P<value>[^`']+)'?)?`")
_WITHOUT_FLAG = re.compile(r"(?:, )?`(?:scale_dtype|step)`")
"""Set by the layout, never by the user: on the command line lists of parameters don't name it."""


def as_flags(text: str, command: click.Command, option_of: Mapping[str, str]) -> str:
    """The text with flags for the parameters in backticks; what is no parameter stays as it is.

    Args:
        text: a message of the Python API.
        command: whose options the flags are.
        option_of: parameter name to the name of its option, where that is another.
    """
    options = {option.name: option for option in command.params if isinstance(option, click.Option)}

    def flag(match: re.Match[str]) -> str:
        option = options.get(option_of.get(match["name"], match["name"]))
        return match[0] if option is None else _flag(option, match["value"])

    return _PARAMETER.sub(flag, _WITHOUT_FLAG.sub("", text))


def _flag(option: click.Option, value: str | None) -> str:
    on, off = option.opts[-1], option.secondary_opts
    if value is None:
        return "/".join((on, *off[-1:]))
    if value in ("True", "False"):
        return on if value == "True" else off[-1]
    return f"{on} {value}"
