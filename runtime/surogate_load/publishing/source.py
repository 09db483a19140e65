"""Where an artifact comes from, as its model card says it: the base model, its licence and its own card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from surogate_formats.errors import SurogateError
from surogate_formats.hub_text import HUB_ID, reason
from surogate_formats.manifest import Manifest
from surogate_load.publishing.errors import UnreadableCardError, upload_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Fields of the source's card that hold for the artifact too."""


@dataclass(frozen=True)
class Base:
    """A repository on the Hub, and its commit where it is known."""

    name: str
    revision: str | None


@dataclass(frozen=True)
class SourceCard:
    """The source's model card: fields, and the text below them; both empty where there is none."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


def base_of(manifest: Manifest, given: str | None) -> Base | None:
    """The repository that was quantized: as given, else the recorded source if it can be one."""
    if given is not None and given != manifest.source:
        return Base(given, None)
    if HUB_ID.fullmatch(manifest.source):
        return Base(manifest.source, manifest.revision)
    return None


def read_source_card(base: Base | None, given: str | Path | None, api: HfApi, say: Callable[[str], None]) -> SourceCard:
    """The source's card, from a file or from the Hub; says so where there is none, or no licence in it.

    Raises:
        UnreadableCardError: the file that was given can't be read.
    """
    if given is not None:
        try:
            content = Path(given).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableCardError(f"{given}: can't be read as a model card ({reason(error)})") from error
    else:
        content = _download(base, api, say) if base else ""
    card = parse_card(content)
    if not card.fields.get("license"):
        say("the source's card names no licence, so this one doesn't")
    return card


def parse_card(content: str) -> SourceCard:
    """Takes a card apart; fields that aren't YAML, which the Hub shows nevertheless, are none."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(content, ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError):
        return SourceCard({}, content)
    return SourceCard({name: card.data.get(name) for name in CARRIED if card.data.get(name)}, card.text)


def _download(base: Base, api: HfApi, say: Callable[[str], None]) -> str:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        with upload_errors(base.name):
            try:
                path = api.hf_hub_download(base.name, "README.md", revision=base.revision)
            except RemoteEntryNotFoundError:
                return ""
    except SurogateError as error:
        say(f"{base.name}: its model card can't be had ({reason(error.__cause__ or error)})")
        return ""
    return Path(path).read_text("utf-8", errors="replace")
