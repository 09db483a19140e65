"""Every attack by its name."""

from pathlib import Path

from attacks.against_attacks import AGAINST_ATTACKS
from attacks.artifact_attacks import ARTIFACT_ATTACKS
from attacks.attack import Attack
from attacks.bomb_attacks import BOMB_ATTACKS
from attacks.config_attacks import CONFIG_ATTACKS
from attacks.directory_attacks import DIRECTORY_ATTACKS, write
from attacks.foreign_attacks import FOREIGN_ATTACKS
from attacks.header_attacks import HEADER_ATTACKS
from attacks.manifest_attacks import MANIFEST_ATTACKS
from attacks.yaml_attacks import YAML_ATTACKS


def _of_header(data: bytes, error: type) -> Attack:
    def make(directory: Path) -> None:
        write(directory, {"config.json": b"{}", "model.safetensors": data})

    return Attack(make, "quantize", error, "model.safetensors")


FAMILIES: tuple[dict[str, Attack], ...] = (
    {name: _of_header(data, error) for name, (data, error) in HEADER_ATTACKS.items()},
    {name: Attack(attack.make, "quantize", attack.error, attack.names) for name, attack in DIRECTORY_ATTACKS.items()},
    BOMB_ATTACKS,
    ARTIFACT_ATTACKS,
    MANIFEST_ATTACKS,
    CONFIG_ATTACKS,
    FOREIGN_ATTACKS,
    AGAINST_ATTACKS,
    YAML_ATTACKS,
)

ATTACKS: dict[str, Attack] = {name: attack for family in FAMILIES for name, attack in family.items()}
"""Names are unique over all families; the test sees to it."""

WHILE_READ = {
    "shard shrinks while it is read": "TruncatedFileError",
    "shard is written to while it is read": "ChangedFileError",
    "F4 tensor read as an array": "NoNumpyTypeError",
}
"""What no directory can hold, or no command asks for, with its error: tested on its own."""


def table() -> str:
    """The rows of the README: error, command, attacks."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, attack in ATTACKS.items():
        rows.setdefault((attack.error.__name__, attack.command), []).append(name)
    for name, error in WHILE_READ.items():
        rows.setdefault((error, "read"), []).append(name)
    lines = [f"| `{error}` | {command} | {'; '.join(names)} |" for (error, command), names in rows.items()]
    return "\n".join(lines)
