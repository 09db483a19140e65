"""`surogate-load`: what an artifact is, whether it is whole, how well it predicts, and what can be made of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import click

from surogate_formats.codes_in_words import CODES
from surogate_load.cli_options import DTYPE, OUT, REVISION, TOKEN, known_errors, on_the_hub, print_rows


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="surogate-quant", prog_name="surogate-load")
def main() -> None:
    """Look at, check, run and export models that surogate-quantize, or others, packed.

    ARTIFACT is a directory, or a name on the Hub such as me/model-nf4.
    """


@main.command()
@click.argument("artifact", type=click.Path())
@click.option("--modules", is_flag=True, help="List every quantized module: name, shape, bits per weight, error.")
@click.option("--json", "json_mode", is_flag=True, help="Print the result as JSON.")
@REVISION
@TOKEN
@known_errors
def inspect(artifact: str, modules: bool, json_mode: bool, revision: str | None, token: str | None) -> None:
    """Say what ARTIFACT is and who can load it.

    Format, layout, sizes, errors, what was kept and why, and the readers with their reasons. No tensor is read, or
    downloaded.
    """
    from surogate_load.hub_headers import without_tensors
    from surogate_load.inspection import describe, describe_modules, lines, module_lines
    from surogate_load.local import open_local

    with without_tensors(artifact, revision, token) as directory, open_local(directory) as opened:
        found = describe(opened)
        listed = describe_modules(opened) if modules else {}
    if json_mode:
        click.echo(json.dumps({**found, "modules": listed} if modules else found, indent=2))
    elif modules:
        click.echo("\n".join(module_lines(listed)))
    else:
        print_rows(lines(found))


@main.command()
@click.argument("artifact", type=click.Path())
@click.option(
    "--against", metavar="MODEL", type=click.Path(), help="Directory of the source: recompute every error from it, too."
)
@on_the_hub
def verify(artifact: str, against: str | None) -> None:
    """Compare every tensor of ARTIFACT with its SHA-256.

    The manifest records them. The first tensor or file that differs is named, and the exit status is 1.
    """
    from surogate_formats.checkpoint.errors import shown
    from surogate_load.local import open_local

    with open_local(artifact) as opened:
        click.echo(f"{artifact}: {opened.verify()} tensors are as they were written")
        if opened.checkpoint.unused:
            names = ", ".join(map(shown, opened.checkpoint.unused))
            click.echo(f"Warning: {artifact}: safetensors files that are no part of it: {names}", err=True)
        if against is not None:
            from surogate_load.verification import verify_against

            found = verify_against(opened, against)
            click.echo(
                f"{against}: {found.quantized} weights have the recorded errors, {found.least:.4f} to "
                f"{found.largest:.4f}, and {found.kept} tensors are the source's"
            )


@main.command()
@click.argument("artifact", type=click.Path())
@click.option(
    "--against",
    required=True,
    metavar="MODEL",
    type=click.Path(),
    help="Directory of the dense model that it was made from.",
)
@click.option("--text", type=click.Path(), help="A text file; its first tokens are predicted.  [default: the "
              "language reference of the running Python]")  # fmt: skip
@click.option("--context", type=click.IntRange(min=2), help="Tokens of a window.  [default: 1024, or as many as the "
              "model takes]")  # fmt: skip
@click.option("--windows", default=3, show_default=True, type=click.IntRange(min=1), help="How many windows.")
@click.option("--device", default="cpu", show_default=True, help="Where both models run.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Of both models.  [default: as in "
              "the source]")  # fmt: skip
@click.option("--adapter", metavar="DIR", type=click.Path(), help="An adapter of ARTIFACT that PEFT saved; init: the "
              "one that was made with it.")  # fmt: skip
@click.option("--json", "json_mode", is_flag=True, help="Print the result as JSON.")
@on_the_hub
def evaluate(artifact: str, against: str, text: str | None, windows: int, json_mode: bool, **options: Any) -> None:
    """Compare ARTIFACT with the dense model, on a text.

    Prints the mean KL divergence, both perplexities, and the share of tokens after which both find the same token
    likeliest. A decoder block of one model is in memory at a time, and what is no block of both.
    """
    from surogate_load.evaluation import evaluate_artifact

    told = partial(click.echo, err=True)
    found = evaluate_artifact(artifact, against, text, count=windows, told=told, **options)
    rows = {
        "tokens": found.tokens,
        "mean KL (nats)": round(found.mean_kl, 6),
        "perplexity": round(found.perplexity, 4),
        "perplexity of the dense model": round(found.reference_perplexity, 4),
        "top-1 agreement": round(found.top1_agreement, 4),
    }
    click.echo(json.dumps(rows, indent=2)) if json_mode else print_rows(rows)


@main.command()
@click.argument("artifact", type=click.Path())
@OUT
@DTYPE
@on_the_hub
def dequantize(artifact: str, out: str, dtype: str | None) -> None:
    """Write ARTIFACT as a dense checkpoint that loads anywhere."""
    from surogate_load.export.dense import dequantize as export

    click.echo(export(artifact, out, dtype))


@main.command()
@click.argument("artifact", type=click.Path())
@click.argument("adapter", type=click.Path())
@OUT
@DTYPE
@click.option("--requantize", is_flag=True, help="Pack the result as ARTIFACT is packed, and say what that lost.")
@click.option("--codes", type=click.Choice(CODES), help="With --requantize: how codes "
              "are chosen.  [default: as ARTIFACT's were]")  # fmt: skip
@click.option("--calibration-text", metavar="FILE", type=click.Path(), help="With --requantize: text for calibrated "
              "codes.  [default: the merged model writes it]")  # fmt: skip
@click.option("--json", "json_mode", is_flag=True, help="Print the result as JSON.")
@on_the_hub
def merge(
    artifact: str,
    adapter: str,
    out: str,
    dtype: str | None,
    requantize: bool,
    codes: str | None,
    calibration_text: str | None,
    json_mode: bool,
) -> None:
    """Write ARTIFACT with ADAPTER merged into it.

    ADAPTER is a directory that PEFT saved. The result is a dense checkpoint, or with --requantize an artifact.
    """
    if requantize:
        from surogate_load.export.requantize import merge_requantized

        found = merge_requantized(artifact, adapter, out, dtype, codes=codes, calibration_text=calibration_text)
        click.echo(json.dumps({**asdict(found), "out": out}, indent=2)) if json_mode else print_rows(found.lines())
        if found.warning is not None:
            click.echo(f"Warning: {found.warning}", err=True)
        return
    if codes is not None or calibration_text is not None:
        raise click.UsageError("--codes and --calibration-text choose how --requantize packs; add it")
    from surogate_load.export.merging import merge as export

    written = str(export(artifact, adapter, out, dtype))
    click.echo(json.dumps({"out": written}, indent=2) if json_mode else written)


@main.command()
@click.argument("artifact", type=click.Path())
@click.argument("adapter", type=click.Path())
@OUT
@on_the_hub
def export_adapter(artifact: str, adapter: str, out: str) -> None:
    """Write what ADAPTER has learned, for the dense model.

    ADAPTER is a directory that PEFT saved. The adapter that ARTIFACT came with makes up for the error of its weights,
    which the dense model hasn't: the result is the difference of the two, with the ranks of both.
    """
    from surogate_load.export.adapter_change import export_adapter as export

    click.echo(export(artifact, adapter, out))


@main.command()
@click.argument("artifact", type=click.Path())
@click.argument("prompt")
@click.option("--adapter", type=click.Path(), help="Directory of an adapter that PEFT saved.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option("--chat/--no-chat", default=None, help="Use the chat template.  [default: where there is one]")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1), help="At most.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0: the likeliest.")
@click.option("--seed", type=int, help="Of what is drawn at a temperature above 0.  [default: another each time]")
@on_the_hub
def generate(artifact: str, prompt: str, **options: Any) -> None:
    """Print what ARTIFACT says after PROMPT."""
    from transformers import TextStreamer

    from surogate_load.generation import generate as say

    say(artifact, prompt, streamer=lambda t: TextStreamer(t, skip_prompt=True, skip_special_tokens=True), **options)


@main.command()
@click.argument("artifact", type=click.Path())
@click.argument("repo")
@click.option("--private", is_flag=True, help="A repository that is made is private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of a commit.")
@click.option("--commit-message", metavar="TEXT", help="The commit's first line.")
@TOKEN
@click.option("--base-model", metavar="REPO", help="What ARTIFACT was made from.  [default: the recorded source, if it "
              "is a repository]")  # fmt: skip
@click.option("--source-card", type=click.Path(), help="The source's README.md.  [default: the base model's]")
@known_errors
def push(artifact: str, repo: str, **options: Any) -> None:
    """Upload ARTIFACT to REPO on the Hub, with a model card.

    ARTIFACT is a directory. It is verified and goes up in one commit; the address is printed.
    """
    from surogate_load.publishing.push import Push, push

    click.echo(push(artifact, repo, Push(**options), lambda line: click.echo(line, err=True)))
