"""transformers, as far as a config.json decides: which class makes the model, and the config that it is made from."""

from __future__ import annotations

from typing import Any

from surogate_formats.artifact import Artifact
from surogate_load.errors import MissingExtraError, UnknownArchitectureError

DECLARATIONS = ("quantization_config", "compression_config")
"""Keys of config.json that say how weights are packed."""


def one_line(error: BaseException) -> str:
    """The first line of another library's message, without the full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".:")


def need_transformers() -> Any:
    """The package transformers; `MissingExtraError` if it isn't installed."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers is not installed: pip install surogate-quant[train]") from error
    return transformers


def model_class(config: dict[str, Any]) -> Any:
    """The architecture that a config.json names; without one, what transformers trains as a causal language model."""
    transformers = need_transformers()
    names = [name for name in config.get("architectures") or () if isinstance(name, str)]
    known = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    return known[0] if known else transformers.AutoModelForCausalLM


def model_config(artifact: Artifact, overrides: dict[str, Any]) -> Any:
    """The artifact's config.json as transformers' object, with some of its values changed.

    Raises:
        UnknownArchitectureError: the installed transformers knows no such model.
    """
    transformers = need_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(str(artifact.path), local_files_only=True, **overrides)
    except ValueError as error:
        raise UnknownArchitectureError(
            f"{artifact.path}: transformers {transformers.__version__} knows no model_type "
            f"{artifact.config.get('model_type')!r} ({one_line(error)}); try a newer transformers"
        ) from error
