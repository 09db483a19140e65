"""`surogate-quantize`: a thin call of `surogate_quantize.quantize`."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import click

from surogate_formats.codes_in_words import CODES
from surogate_quantize.flags import as_flags
from surogate_quantize.interruption import leaving, one_line_at_the_end
from surogate_quantize.version import VERSION

if TYPE_CHECKING:
    from surogate_formats.training_config import TrainingConfig
    from surogate_quantize.console import Out
    from surogate_quantize.options import Options

EXAMPLES = """
\b
Examples:
  surogate-quantize ./SmolLM2-135M --format nf4 --out ./SmolLM2-135M-nf4
  surogate-quantize ./Qwen3-4B --format fp4 --1d --dry-run
  surogate-quantize ./Qwen3-4B --format fp8 --scaling channel --skip-last-layers 2 --out ./Qwen3-4B-fp8
  surogate-quantize ./Qwen3-4B --config train.yaml --out ./Qwen3-4B-packed
  surogate-quantize Qwen/Qwen3-4B --format nf4 --out ./Qwen3-4B-nf4 --push-to-hub me/Qwen3-4B-nf4
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

LAYOUTS = ("surogate", "compressed-tensors", "hf-fp8", "modelopt", "bitsandbytes")
"""Names of the layouts, written out so that `--help` need not import them."""

DEVICES = ("auto", "cpu", "cuda")
"""Those of `surogate_quantize.devices`, for the same reason."""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("model", required=False)
@click.option("--format", "format_name", type=click.Choice(["nf4", "fp4", "fp8"]), help="What the weights become.")
@click.option("--out", type=click.Path(), help="Directory of the artifact; must not exist, or be empty.")
@click.option("--config", type=click.Path(), help="Training file (YAML) with qlora_* keys; options given here win, "
              "--format too.")  # fmt: skip
@click.option("--layout", type=click.Choice(LAYOUTS), help="How tensors are named on disk.  [default: surogate for "
              "nf4, compressed-tensors for fp4 and fp8, hf-fp8 for fp8 with --scaling block, modelopt for fp4 where "
              "experts are quantized]")  # fmt: skip
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
@click.option("--codes", type=click.Choice(CODES), help="How codes and scales are chosen: nearest to the weights, "
              "search for the scales with the least error, or calibrated on text.  [default: nearest]")  # fmt: skip
@click.option("--calibrate", is_flag=True, help="Short for --codes calibrated: the same bytes and layout, a third to a "
              "half of the KL; takes minutes, and transformers.")  # fmt: skip
@click.option("--calibration-text", metavar="FILE", type=click.Path(), help="Text (.txt, or .jsonl with text or "
              "input_ids) to calibrate on.  [default: the model writes it]")  # fmt: skip
@click.option("--calibration-tokens", type=click.IntRange(min=1), help="How much of it.  [default: by the widest "
              "weight, 14336 or more]")  # fmt: skip
@click.option("--adapter-init", metavar="RANK", type=click.IntRange(min=1), help="Write a LoRA adapter, too, that "
              "starts from what is left of the error; found on the same text.")  # fmt: skip
@click.option("--adapter-joint", is_flag=True, help="With --calibrate and --adapter-init: choose codes and adapter "
              "together; better with the adapter, worse without it.")  # fmt: skip
@click.option("--skip-first-layers", type=click.IntRange(min=0), help="Decoder blocks that stay as they are.")
@click.option("--skip-last-layers", type=click.IntRange(min=0), help="Decoder blocks that stay as they are.")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Modules that stay as they are, beside the usual ones: "
              "layers.0.mlp, *.o_proj, re:REGEX. Repeatable.")  # fmt: skip
@click.option("--quantize-lm-head", is_flag=True, help="Quantize the output head, too, unless it is the embedding; in "
              "layouts surogate, compressed-tensors and modelopt.")  # fmt: skip
@click.option("--revision", help="Branch, tag or commit of a MODEL on the Hub.  [default: its default branch]")
@click.option("--token", help="For the Hub.  [default: HF_TOKEN, else the login of hf auth login]")
@click.option("--keep-source", is_flag=True, help="Leave a MODEL's shards in the Hub's cache; else each is deleted "
              "once it is quantized.")  # fmt: skip
@click.option("--hash-source", is_flag=True, help="Record the SHA-256 of every source file in the manifest; a local "
              "MODEL is read twice for it.")  # fmt: skip
@click.option("--max-shard-size", default="5GB", show_default=True, help="Payload of one output file.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="What quantizes; it "
              "changes calibrated codes alone. auto: a GPU where CuPy is there to use it.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: one a CPU]")
@click.option("--max-memory", default="2GiB", show_default=True, help="What the process stays inside, whatever the "
              "model's size.")  # fmt: skip
@click.option("--strict", is_flag=True, help="Refuse every key of --config that is not ours.")
@click.option("--overwrite", is_flag=True, help="Replace the artifact in --out once the new one is complete, and "
              "discard an unfinished run of another command.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would happen to every tensor and the sizes; write nothing. "
              "What stands in --out is checked as the run would, and so are model and text that are calibrated on; the "
              "disk's room is not.")  # fmt: skip
@click.option("--push-to-hub", metavar="REPO", help="Upload the artifact, with a model card, once it is complete.")
@click.option("--private", is_flag=True, help="With --push-to-hub: a repository that is made is private.")
@click.option("--create-pr", is_flag=True, help="With --push-to-hub: open a pull request instead of a commit.")
@click.option("--commit-message", metavar="TEXT", help="With --push-to-hub: the commit's first line.")
@click.option("--json", "json_mode", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print the artifact's path alone; with --dry-run warnings and errors "
              "alone.")  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="A line for every tensor; without --dry-run on stderr, before the "
              "run.")  # fmt: skip
@click.version_option(VERSION, prog_name="surogate-quantize")
def main(**arguments: Any) -> None:
    """Quantize the linear weights of MODEL, once and offline.

    MODEL is a directory with a Hugging Face checkpoint in safetensors, or a name on the Hub such as org/model. The
    artifact in --out holds packed safetensors, config.json, the tokenizer and a manifest (surogate.json). surogate_load
    trains LoRA on it.
    """
    if arguments["json_mode"] and arguments["quiet"]:
        raise click.UsageError("--json and --quiet are two forms of output; choose one")
    if arguments["format_name"] is None and arguments["config"] is None:
        raise click.UsageError("say what to make: --format nf4, fp4 or fp8, or --config FILE")
    with one_line_at_the_end():
        _answer(arguments)


def _answer(arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: click.echo(f"Warning: {message}", err=True)
        from surogate_formats.errors import SurogateError, UsageError
        from surogate_quantize.console import Out
        from surogate_quantize.ranks.environment import is_first_rank
        from surogate_quantize.ranks.errors import RankError

        try:
            quiet = arguments["quiet"] or not is_first_rank()
            with Out(arguments["json_mode"], quiet, arguments["verbose"], _flags) as out:
                _run(out, arguments)
        except SurogateError as error:
            if os.environ.get("SUROGATE_DEBUG"):
                raise
            if is_first_rank() or isinstance(error, RankError):
                click.echo(f"Error: {_flags(str(error))}", err=True)
            sys.exit(2 if isinstance(error, UsageError) else 1)


def _flags(text: str) -> str:
    return as_flags(
        text, main, {**{parameter: option for option, parameter in FORMAT_PARAMETERS.items()}, "training": "config"}
    )


def _run(out: Out, arguments: dict[str, Any]) -> None:
    from surogate_quantize.hub.push import check_push, push
    from surogate_quantize.ranks.environment import is_first_rank, world_size
    from surogate_quantize.run import dry_run, quantize

    check_push(arguments)
    model, options = _options(out, arguments)
    target = arguments["out"]
    hub = {"revision": arguments["revision"], "token": arguments["token"]}
    how = {name: arguments[name] for name in ("device", "workers", "max_memory", "overwrite")}
    if model is None:
        raise click.UsageError("Missing argument 'MODEL' (or a --config that names a model).")
    if arguments["dry_run"]:
        out.plan(*dry_run(model, options, target, **how, **hub))
        return
    if target is None:
        raise click.UsageError("Missing option '--out' (or --dry-run).")
    watch = out.watch if is_first_rank() else None
    how |= {name: arguments[name] for name in ("keep_source", "hash_source")}
    summary = quantize(model, target, options, **how, **hub, ranks=world_size() > 1, watch=watch, told=out.note)
    if not is_first_rank():
        return
    with leaving(f"{target} is complete"):
        out.close()
        out.summary(summary)
        if arguments["push_to_hub"] is not None:
            push(out, model, arguments)


def _options(out: Out, arguments: dict[str, Any]) -> tuple[str | None, Options]:
    from surogate_quantize.options import make_options

    training = _training(out, arguments) if arguments["config"] is not None else None
    parameters = {
        parameter: arguments[option] for option, parameter in FORMAT_PARAMETERS.items() if arguments[option] is not None
    }
    if "double_quant" in parameters:
        parameters["double_quant"] = None if parameters["double_quant"] else "none"  # on: as the layout stores it
    options = make_options(
        arguments["format_name"],
        parameters,
        arguments["layout"],
        training=training,
        skip_first_layers=arguments["skip_first_layers"],
        skip_last_layers=arguments["skip_last_layers"],
        skip=arguments["skip"],
        max_shard_size=arguments["max_shard_size"],
        quantize_lm_head=arguments["quantize_lm_head"],
        codes=_codes(arguments),
        calibration_text=arguments["calibration_text"],
        calibration_tokens=arguments["calibration_tokens"],
        adapter_init=arguments["adapter_init"],
        adapter_joint=arguments["adapter_joint"],
    )
    return arguments["model"] or (training.model if training else None), options


def _codes(arguments: dict[str, Any]) -> Any:
    if arguments["calibrate"] and arguments["codes"] not in (None, "calibrated"):
        raise click.UsageError(f"--calibrate is --codes calibrated, and --codes is {arguments['codes']}; leave one out")
    return "calibrated" if arguments["calibrate"] else arguments["codes"] or "nearest"


def _training(out: Out, arguments: dict[str, Any]) -> TrainingConfig:
    from surogate_formats.training_config import UnknownKeyError, load_training_config

    path, name = arguments["config"], arguments["format_name"]
    training = load_training_config(path, format_name=name)
    if training.ignored and arguments["strict"]:
        raise UnknownKeyError(
            f"{path}: not keys of ours: {', '.join(training.ignored)}; leave out --strict to pass over them"
        )
    if training.ignored:
        out.note(f"{path}: not ours, passed over: {', '.join(training.ignored)}")
    if name and training.format_name not in (name, None):
        out.note(f"{path}: asks for {training.format_name}; --format {name} wins")
    return training
