"""The model card of an artifact: what it is, how good, how it was made, and how each reader loads it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from surogate_formats.artifact import Artifact
from surogate_formats.block_errors import output_errors
from surogate_formats.codes_in_words import WRITTEN, codes_in_words
from surogate_formats.manifest import Manifest, TensorRecord
from surogate_load.inspection import describe
from surogate_load.publishing.command import command_of
from surogate_load.publishing.readers import how_to_load
from surogate_load.publishing.source import Base, SourceCard

CARD = "README.md"
PLOT = "quantization_errors.png"

TRANSFORMERS_READS = frozenset({"bitsandbytes", "compressed-tensors", "hf-fp8"})
"""Layouts that transformers loads without a package of ours."""

NUMBERS = {"nf4": ("nf4", "4-bit"), "fp4": ("nvfp4", "fp4", "4-bit"), "fp8": ("fp8", "8-bit")}
"""Format to the Hub's usual tags for it."""


_ADAPTER = (
    'The LoRA adapter in `adapter-init` starts from what is left of the error: `load_model("{repo}", adapter="init")`. '
    "It isn't for the dense model, for which `surogate-load export-adapter` writes what was trained."
)


def make_card(artifact: Artifact, repo: str, base: Base | None, source: SourceCard, *, plot: bool) -> str:
    """README.md: YAML fields as the Hub expects them, and Markdown.

    Args:
        artifact: open, and ours.
        repo: where it will be.
        base: the repository that was quantized.
        source: its card.
        plot: whether `PLOT` goes along.
    """
    found = describe(artifact)
    title = repo.rpartition("/")[2]
    of = f"[{base.name}](https://huggingface.co/{base.name})" if base else f"`{artifact.manifest.source}`"
    parts = [
        f"# {title}",
        f"{of}, its linear weights packed by surogate-quant in format `{found['format']}`, layout `{found['layout']}`.",
        "## What was quantized",
        _table(_facts(artifact, found)),
        _table(_errors(artifact.manifest)),
        "The relative error is ||dequantized - source|| / ||source|| of a weight. It says nothing about the quality "
        "of the model's answers.",
        *_outputs(artifact.manifest),
        f"![Errors of weights, and of outputs where the model was run on text, by layer]({PLOT})" if plot else "",
        "## How it was made",
        _fenced("bash", command_of(artifact.manifest)),
        _origin(artifact.manifest),
        "## How to load it",
        how_to_load(found["loads_in"], artifact.config, repo),
        _ADAPTER.format(repo=repo) if artifact.manifest.options.get("adapter_init") is not None else "",
        *(("## The source's model card", source.text.strip()) if source.text.strip() else ()),
    ]
    return f"---\n{_fields(artifact, base, source)}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _fields(artifact: Artifact, base: Base | None, source: SourceCard) -> str:
    from huggingface_hub import ModelCardData

    layout, name = artifact.layout.name, artifact.format.name
    carried: dict[str, Any] = dict(source.fields)
    link = carried.get("license_link")
    if base and isinstance(link, str) and "://" not in link and link not in artifact.manifest.sidecars:
        carried["license_link"] = f"https://huggingface.co/{base.name}/blob/{base.revision or 'main'}/{link}"
    fields: dict[str, Any] = {
        **({"base_model": base.name, "base_model_relation": "quantized"} if base else {}),
        **carried,
        "library_name": "transformers" if layout in TRANSFORMERS_READS else "surogate-quant",
        "tags": ["surogate-quant", *NUMBERS[name], *({layout} - {"surogate"})],
    }
    return ModelCardData(**fields).to_yaml(original_order=list(fields))


def _facts(artifact: Artifact, found: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    share = found["quantized_parameters"] / max(found["parameters_in_all"], 1)
    yield "", ""
    yield "format", f"{found['format']} ({', '.join(f'{key} {value}' for key, value in found['parameters'].items())})"
    yield "codes", codes_in_words(artifact.manifest.options)
    yield "quantized", f"{found['quantized_weights']} weights, {share:.1%} of {found['parameters_in_all'] / 1e6:.1f} M"
    yield "kept", "; ".join(f"{count} {reason}" for reason, count in found["kept"].items()) or "nothing"
    yield (
        "bits per weight",
        (f"{found['bits_per_quantized_weight']:.3f} quantized, {found['bits_per_parameter']:.3f} over the model"),
    )
    yield "size", f"{found['bytes'] / 1e6:.1f} MB in {found['files']} {'file' if found['files'] == 1 else 'files'}"
    yield "recipe for training", artifact.recipe.name


def _errors(manifest: Manifest) -> Iterable[tuple[str, ...]]:
    """Weights by the last part of their module's name."""
    groups: dict[str, list[tuple[str, TensorRecord]]] = defaultdict(list)
    for name, record in manifest.tensors.items():
        if record.decision == "quantize" and record.relative_error is not None:
            module = name.removesuffix(".weight")
            groups[module.rpartition(".")[2]].append((module, record))
    yield "projection", "weights", "bits", "mean relative error", "largest relative error", "largest error"
    for name, members in groups.items():
        errors = [record.relative_error or 0.0 for _, record in members]
        worst = max(members, key=lambda member: member[1].relative_error or 0.0)[0]
        yield (
            name,
            str(len(members)),
            f"{sum(record.bits_per_weight for _, record in members) / len(members):.3f}",
            f"{sum(errors) / len(errors):.4f}",
            f"{max(errors):.4f} (`{worst}`)",
            f"{max(record.max_error or 0.0 for _, record in members):.4g}",
        )


def _outputs(manifest: Manifest) -> Iterable[str]:
    """What rounding costs at the outputs of each block's linears, where the model was run on text."""
    blocks = output_errors(manifest.tensors)
    if not blocks:
        return
    adapted = " and their adapter" if manifest.options.get("adapter_init") is not None else ""
    rows = [("block", "linears", "nearest codes", f"these codes{adapted}")]
    rows += [(str(n), str(error.weights), f"{error.nearest:.4f}", f"{error.packed:.4f}") for n, error in blocks.items()]
    yield _table(rows)
    yield (
        "The error of a linear's output is ||Q x - W x'|| / ||W x'|| on text that the codes were not solved on: x' is "
        "what the original model gives the linear W, and x what the packed one gives Q. The table has means of blocks."
    )


def _origin(manifest: Manifest) -> str:
    revision = f", revision `{manifest.revision}`" if manifest.revision else ""
    text = manifest.options.get("calibration_text", WRITTEN)
    same = "" if "calibration_text" not in manifest.options else " on the same device with the same number of threads"
    file = "" if text == WRITTEN else f" FILE is the text with the {text}."
    return (
        f"surogate-quant {manifest.tool_version} from `{manifest.source}`{revision}.{file} The same command makes the "
        f"same tensors{same}, byte by byte; `surogate.json` records the SHA-256, the decision and the errors of every "
        "tensor, and `surogate-load verify` checks them."
    )


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * (lines[0].count(" | ") + 1), *lines[1:]])


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
