"""Writes docs/api.md from the docstrings of the public names; `--check` fails if it isn't what the docstrings say."""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

PACKAGES = {
    "surogate_load": "Load artifacts, train on them",
    "surogate_quantize": "Quantize checkpoints",
    "surogate_formats": "The formats themselves, in numpy",
}

MORE = {
    "surogate_load": ("MicroStep", "captured"),
    "surogate_formats": (
        "registry.make_format",
        "nf4.NF4",
        "nvfp4.NVFP4",
        "fp8.FP8",
        "recipe.Recipe",
        "artifact.Artifact",
    ),
}
"""Public names that a package doesn't list in `__all__`."""

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def main() -> None:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = page()
    if not arguments.check:
        PAGE.write_text(text, "utf-8")
    elif PAGE.read_text("utf-8") != text:
        sys.exit(f"{PAGE} is out of date: run tools/make_api.py")


def page() -> str:
    """The whole page."""
    parts = ["# API\n\nMade from the docstrings by `tools/make_api.py`.\n"]
    for package, title in PACKAGES.items():
        module = importlib.import_module(package)
        parts.append(f"## {package}: {title}\n\n{inspect.getdoc(module)}\n")
        parts += [_entry(package, name) for name in [*getattr(module, "__all__", ()), *MORE.get(package, ())]]
    return "\n".join(parts)


def _entry(package: str, name: str) -> str:
    home, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(f"{package}.{home}" if home else package), attribute)
    lines = [f"### `{name}{_signature(found)}`", "", _indented(inspect.getdoc(found) or "")]
    if inspect.isclass(found):
        for method, function in vars(found).items():
            if not method.startswith("_") and callable(getattr(found, method)) and inspect.getdoc(function):
                first = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
                lines.append(f"- `{method}{_signature(getattr(found, method))}`: {first}")
    return "\n".join(lines) + "\n"


def _signature(found: object) -> str:
    try:
        return str(inspect.signature(found)).replace("'", "").replace('"', "")
    except (TypeError, ValueError):
        return ""


def _indented(text: str) -> str:
    """Sections of a docstring as code, which keeps their columns."""
    summary, _, rest = text.partition("\n\n")
    return f"{summary}\n" + (f"\n```text\n{rest}\n```\n" if rest else "")


if __name__ == "__main__":
    main()
