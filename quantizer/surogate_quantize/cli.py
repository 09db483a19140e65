"""`surogate-quantize`: a thin call of `surogate_quantize.quantize`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from surogate_quantize.version import VERSION

if TYPE_CHECKING:
    from surogate_quantize.console import Out
    from surogate_quantize.options import Options

EXAMPLES = """
\b
Examples:
  surogate-quantize ./SmolLM2-135M --format nf4 --out ./SmolLM2-135M-nf4
  surogate-quantize ./Qwen3-4B --format fp4 --1d --dry-run
  surogate-quantize ./Qwen3-4B --format fp8 --scaling channel --skip-last-layers 2 --out ./Qwen3-4B-fp8
  surogate-quantize ./Qwen3-4B --config train.yaml --out ./Qwen3-4B-packed
"""

FORMAT_PARAMETERS = {
    "block_size": "block_size",
    "double_quant": "double_quant",
    "scaling": "scaling",
    "two_d": "two_d",
    "four_over_six": "four_over_six",
    "four_over_six_metric": "metric",
    "global_scale": "global_scale",
}
"""Options that are parameters of a format, with the parameter's name; the format refuses those that it doesn't have."""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("model", required=False)
@click.option("--format", "format_name", type=click.Choice(["nf4", "fp4", "fp8"]), help="What the weights become.")
@click.option("--out", type=click.Path(), help="Directory of the artifact; must not exist, or be empty.")
@click.option("--config", type=click.Path(), help="Training file (YAML) with qlora_* keys; options given here win.")
@click.option("--layout", help="How tensors are named on disk.  [default: surogate for nf4, compressed-tensors for "
              "fp4 and fp8, hf-fp8 for fp8 with --scaling block]")  # fmt: skip
@click.option("--block-size", type=int, help="nf4: values that share an absmax, 64 or 128.  [default: 64]")
@click.option("--double-quant/--no-double-quant", default=None, help="nf4: 8-bit absmax.  [default: on]")
@click.option("--scaling", type=click.Choice(["tensor", "channel", "block"]), help="fp8: what shares a scale; a block "
              "is 128x128.  [default: tensor]")  # fmt: skip
@click.option("--2d/--1d", "two_d", default=None, help="fp4: one scale a 16x16 tile or a 1x16 block.  [default: 2d]")
@click.option("--four-over-six/--no-four-over-six", default=None, help="fp4: the better of two scales a block.  "
              "[default: on]")  # fmt: skip
@click.option("--four-over-six-metric", type=click.Choice(["mse", "l1", "absmax"]), help="fp4: the error that decides."
              "  [default: mse]")  # fmt: skip
@click.option("--global-scale", type=click.Choice(["pow2", "amax"]), help="fp4: a power of two (exact in bf16), or the "
              "rule of other tools.  [default: pow2]")  # fmt: skip
@click.option("--skip-first-layers", type=click.IntRange(min=0), help="Decoder blocks that stay as they are.")
@click.option("--skip-last-layers", type=click.IntRange(min=0), help="Decoder blocks that stay as they are.")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Modules that stay as they are, beside the usual ones: "
              "layers.0.mlp, *.o_proj, re:REGEX. Repeatable.")  # fmt: skip
@click.option("--max-shard-size", default="5GB", show_default=True, help="Payload of one output file.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: one a CPU]")
@click.option("--strict", is_flag=True, help="Refuse every key of --config that is not ours.")
@click.option("--overwrite", is_flag=True, help="Replace the artifact in --out once the new one is complete.")
@click.option("--dry-run", is_flag=True, help="Print what would happen to every tensor and the sizes; write nothing.")
@click.option("--json", "json_mode", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print the artifact's path alone.")
@click.option("-v", "--verbose", is_flag=True, help="With --dry-run: a line for every tensor.")
@click.version_option(VERSION, prog_name="surogate-quantize")
def main(**arguments: Any) -> None:
    """Quantize the linear weights of MODEL, a directory with a Hugging Face checkpoint, once and offline.

    The artifact in --out holds packed safetensors, config.json, the tokenizer and a manifest (surogate.json).
    surogate_load trains LoRA on it.
    """
    from surogate_formats.errors import SurogateError, UsageError

    if arguments["json_mode"] and arguments["quiet"]:
        raise click.UsageError("--json and --quiet are two forms of output; choose one")
    if arguments["format_name"] is None and arguments["config"] is None:
        raise click.UsageError("say what to make: --format nf4, fp4 or fp8, or --config FILE")
    from surogate_quantize.console import Out

    out = Out(arguments["json_mode"], arguments["quiet"], arguments["verbose"])
    try:
        _run(out, arguments)
    except SurogateError as error:
        out.close()
        if os.environ.get("SUROGATE_DEBUG"):
            raise
        click.echo(f"Error: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        out.close()
        click.echo("Interrupted; nothing was left behind.", err=True)
        sys.exit(130)


def _run(out: Out, arguments: dict[str, Any]) -> None:
    from surogate_quantize.run import dry_run, quantize

    model, options = _options(out, arguments)
    if model is None:
        raise click.UsageError("Missing argument 'MODEL' (or a --config that names a model).")
    if arguments["dry_run"]:
        out.plan(*dry_run(model, options))
        return
    if arguments["out"] is None:
        raise click.UsageError("Missing option '--out' (or --dry-run).")
    summary = quantize(
        model,
        arguments["out"],
        options,
        workers=arguments["workers"],
        overwrite=arguments["overwrite"],
        watch=out.watch,
    )
    out.close()
    out.summary(summary)


def _options(out: Out, arguments: dict[str, Any]) -> tuple[str | None, Options]:
    from surogate_formats.training_config import load_training_config
    from surogate_quantize.options import make_options

    training = None
    if arguments["config"] is not None:
        training = load_training_config(arguments["config"], strict=arguments["strict"])
        if training.ignored:
            out.note(f"{arguments['config']}: not ours, passed over: {', '.join(training.ignored)}")
    parameters = {
        parameter: arguments[option] for option, parameter in FORMAT_PARAMETERS.items() if arguments[option] is not None
    }
    if "double_quant" in parameters:
        parameters["double_quant"] = "affine" if parameters["double_quant"] else "none"
    options = make_options(
        arguments["format_name"],
        parameters,
        arguments["layout"],
        training=training,
        skip_first_layers=arguments["skip_first_layers"],
        skip_last_layers=arguments["skip_last_layers"],
        skip=arguments["skip"],
        max_shard_size=arguments["max_shard_size"],
    )
    return arguments["model"] or (training.model if training else None), options
