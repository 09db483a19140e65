"""A Hub of our own for every test, and the two commands as processes that talk to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub.forked_commands import COMMANDS, ForkedCommands
from hub.server import Hub

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub():
    with Hub() as running:
        yield running


@pytest.fixture
def environment(hub, tmp_path):
    """Of a process that knows no Hub but ours, and no token."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("formats", "quantizer", "runtime")),
    }


@pytest.fixture(scope="session")
def commands():
    with ForkedCommands() as running:
        yield running


@pytest.fixture
def run(commands, environment, tmp_path):
    def command(package, *arguments, **extra):
        if package in COMMANDS and "PYTHONPATH" not in extra:
            return commands.run(package, arguments, environment | extra, tmp_path)
        line = [sys.executable, "-m", package, *map(str, arguments)]
        return subprocess.run(
            line, capture_output=True, text=True, env=environment | extra, cwd=tmp_path, timeout=120, check=False
        )

    return command


@pytest.fixture
def quantize(run):
    return lambda *arguments, **extra: run("surogate_quantize", *arguments, **extra)


@pytest.fixture
def load(run):
    return lambda *arguments, **extra: run("surogate_load", *arguments, **extra)


@pytest.fixture
def our_hub(hub, monkeypatch, tmp_path):
    """The Hub for huggingface_hub in this very process, which has read its settings already."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return hub
