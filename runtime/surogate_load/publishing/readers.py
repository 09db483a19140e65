"""How each reader of an artifact loads it, for its model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

OWN_IMPORT = "where surogate_load is imported"
"""In a remark: transformers needs us."""

NOT_READ = ("not ", "reads the experts wrongly")
"""How the remark of a reader starts that is listed and shown no way to load the artifact."""


def how_to_load(readers: Mapping[str, str], config: Mapping[str, Any], repo: str) -> str:
    """A list of readers with remarks, and below it the lines that load the artifact in each.

    Args:
        readers: reader to remark, from `surogate_load.readers`.
        config: the artifact's config.json.
        repo: the artifact's repository.
    """
    listed = [f"- {reader}: {remark}" if remark else f"- {reader}" for reader, remark in readers.items()]
    shown = {
        reader: _LINES[reader](repo, config, remark)
        for reader, remark in readers.items()
        if reader in _LINES and not remark.startswith(NOT_READ)
    }
    blocks = [f"{reader}:\n\n```{language}\n{text}\n```" for reader, (language, text) in shown.items()]
    return "\n\n".join(["\n".join(listed), *blocks])


def _surogate_load(repo: str, config: Mapping[str, Any], remark: str) -> tuple[str, str]:
    install = "# pip install 'surogate-quant[train]'"
    return "python", f'{install}\nimport surogate_load\n\nmodel = surogate_load.load_model("{repo}")'


def _transformers(repo: str, config: Mapping[str, Any], remark: str) -> tuple[str, str]:
    architecture = str((config.get("architectures") or ["AutoModelForCausalLM"])[0])
    name = "AutoModelForCausalLM" if architecture.endswith("ForCausalLM") else architecture
    own = "import surogate_load\n" if OWN_IMPORT in remark else ""
    return "python", f'{own}from transformers import {name}\n\nmodel = {name}.from_pretrained("{repo}")'


_LINES: Mapping[str, Callable[[str, Mapping[str, Any], str], tuple[str, str]]] = {
    "surogate_load": _surogate_load,
    "transformers": _transformers,
    "vLLM": lambda repo, config, remark: ("bash", f"vllm serve {repo}"),
    "SGLang": lambda repo, config, remark: ("bash", f"python -m sglang.launch_server --model-path {repo}"),
    "TensorRT-LLM": lambda repo, config, remark: ("bash", f"trtllm-serve {repo}"),
    "Surogate": lambda repo, config, remark: ("yaml", f"model: {repo}"),
}
