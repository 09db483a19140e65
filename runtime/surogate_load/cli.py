"""`surogate-load`: what an artifact is, whether it is whole, how well it predicts, and what can be made of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import wraps
from typing import Any, ParamSpec

import click

P = ParamSpec("P")


def known_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Prints an error of ours as one line and exits: 1, or 2 where the request was wrong."""

    @wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        from surogate_formats.errors import SurogateError, UsageError

        try:
            command(*args, **kwargs)
        except SurogateError as error:
            if os.environ.get("SUROGATE_DEBUG"):
                raise
            click.echo(f"Error: {error}", err=True)
            sys.exit(2 if isinstance(error, UsageError) else 1)

    return guarded


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="surogate-quant", prog_name="surogate-load")
def main() -> None:
    """Artifacts of surogate-quantize: inspect, verify, evaluate, generate, dequantize, merge, push."""


@main.command()
@click.argument("artifact")
@click.option("--modules", is_flag=True, help="List every quantized module: name, shape, bits per weight, error.")
@click.option("--json", "json_mode", is_flag=True, help="Print the result as JSON.")
@known_errors
def inspect(artifact: str, modules: bool, json_mode: bool) -> None:
    """What ARTIFACT holds: format, sizes, what was kept and why, and who can load it."""
    from surogate_load.inspection import describe, describe_modules, lines, module_lines
    from surogate_load.local import open_local

    with open_local(artifact) as opened:
        found = describe(opened)
        listed = describe_modules(opened) if modules else {}
    if json_mode:
        click.echo(json.dumps({**found, "modules": listed} if modules else found, indent=2))
    elif modules:
        click.echo("\n".join(module_lines(listed)))
    else:
        _print(lines(found))


@main.command()
@click.argument("artifact")
@click.option("--against", metavar="MODEL", help="Directory of the source: recompute every error from it, too.")
@known_errors
def verify(artifact: str, against: str | None) -> None:
    """Read every tensor of ARTIFACT and compare its SHA-256 with the manifest's."""
    from surogate_load.local import open_local

    with open_local(artifact) as opened:
        click.echo(f"{artifact}: {opened.verify()} tensors are as they were written")
        if against is not None:
            from surogate_load.verification import verify_against

            found = verify_against(opened, against)
            click.echo(
                f"{against}: {found.quantized} weights have the recorded errors, {found.least:.4f} to "
                f"{found.largest:.4f}, and {found.kept} tensors are the source's"
            )


@main.command()
@click.argument("artifact")
@click.option("--against", required=True, metavar="MODEL", help="Directory of the dense model that it was made from.")
@click.option("--text", required=True, type=click.Path(), help="A text file; its first tokens are predicted.")
@click.option("--context", default=1024, show_default=True, type=click.IntRange(min=2), help="Tokens of a window.")
@click.option("--windows", default=3, show_default=True, type=click.IntRange(min=1), help="How many windows.")
@click.option("--device", default="cpu", show_default=True, help="Where both models run.")
@click.option("--json", "json_mode", is_flag=True, help="Print the result as JSON.")
@known_errors
def evaluate(artifact: str, against: str, text: str, context: int, windows: int, device: str, json_mode: bool) -> None:
    """Mean KL divergence and perplexity of ARTIFACT against the dense model, on a text."""
    from surogate_load.evaluation import evaluate_artifact

    found = evaluate_artifact(artifact, against, text, context=context, count=windows, device=device)
    rows = {
        "tokens": found.tokens,
        "mean KL (nats)": round(found.mean_kl, 6),
        "perplexity": round(found.perplexity, 4),
        "perplexity of the dense model": round(found.reference_perplexity, 4),
    }
    click.echo(json.dumps(rows, indent=2)) if json_mode else _print(rows)


_OUT = click.option("--out", required=True, type=click.Path(), help="Directory to write; must not exist.")
_DTYPE = click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of every floating-point tensor.  [default: as in the source]",
)


@main.command()
@click.argument("artifact")
@_OUT
@_DTYPE
@known_errors
def dequantize(artifact: str, out: str, dtype: str | None) -> None:
    """Write ARTIFACT as a dense checkpoint that loads anywhere."""
    from surogate_load.export.dense import dequantize as export

    click.echo(export(artifact, out, dtype))


@main.command()
@click.argument("artifact")
@click.argument("adapter")
@_OUT
@_DTYPE
@click.option("--requantize", is_flag=True, help="Pack the result as ARTIFACT is packed, and say what that lost.")
@click.option("--json", "json_mode", is_flag=True, help="Print the result as JSON.")
@known_errors
def merge(artifact: str, adapter: str, out: str, dtype: str | None, requantize: bool, json_mode: bool) -> None:
    """Write ARTIFACT with ADAPTER, saved by PEFT, merged into it: a dense checkpoint, or an artifact again."""
    if requantize:
        from surogate_load.export.requantize import merge_requantized

        found = merge_requantized(artifact, adapter, out, dtype)
        click.echo(json.dumps({**asdict(found), "out": out}, indent=2)) if json_mode else _print(found.lines())
        return
    from surogate_load.export.merging import merge as export

    written = str(export(artifact, adapter, out, dtype))
    click.echo(json.dumps({"out": written}, indent=2) if json_mode else written)


@main.command()
@click.argument("artifact")
@click.argument("prompt")
@click.option("--adapter", type=click.Path(), help="Directory of an adapter that PEFT saved.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option("--chat/--no-chat", default=None, help="Use the chat template.  [default: where there is one]")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1), help="At most.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0: the likeliest.")
@known_errors
def generate(artifact: str, prompt: str, **options: Any) -> None:
    """What ARTIFACT says after PROMPT, with an adapter if one is given."""
    from transformers import TextStreamer

    from surogate_load.generation import generate as say

    say(artifact, prompt, streamer=lambda t: TextStreamer(t, skip_prompt=True, skip_special_tokens=True), **options)


@main.command()
@click.argument("artifact")
@click.argument("repo")
@click.option("--private", is_flag=True, help="A repository that is made is private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of a commit.")
@click.option("--commit-message", metavar="TEXT", help="The commit's first line.")
@click.option("--token", help="For the Hub.  [default: HF_TOKEN, else the login of hf auth login]")
@click.option("--base-model", metavar="REPO", help="What ARTIFACT was made from.  [default: the recorded source, if it "
              "is a repository]")  # fmt: skip
@click.option("--source-card", type=click.Path(), help="The source's README.md.  [default: the base model's]")
@known_errors
def push(artifact: str, repo: str, **options: Any) -> None:
    """Verify ARTIFACT and upload it to REPO on the Hub, with a model card, in one commit; prints the address."""
    from surogate_load.publishing.push import Push, push

    click.echo(push(artifact, repo, Push(**options), lambda line: click.echo(line, err=True)))


def _print(rows: Mapping[str, Any]) -> None:
    width = max(map(len, rows))
    for key, value in rows.items():
        for index, line in enumerate(value if isinstance(value, list) else [value]):
            click.echo(f"{key if index == 0 else '':{width}}  {line}")
