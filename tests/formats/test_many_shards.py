"""More shards than a process may have files open: the limit is raised where it may be, else said."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

resource = pytest.importorskip("resource")

SHARDS = 90
OPEN = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
from surogate_formats.checkpoint import Checkpoint
from surogate_formats.errors import SurogateError
try:
    with Checkpoint.open(sys.argv[1]) as checkpoint:
        print(len(checkpoint.files), sum(int(checkpoint.read(name)[0]) for name in checkpoint.tensors))
except SurogateError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("many")
    names = [f"model-{number:05d}-of-{SHARDS:05d}.safetensors" for number in range(1, SHARDS + 1)]
    for number, name in enumerate(names):
        save_file({f"t{number}": np.array([number], np.int32)}, directory / name)
    index = {"weight_map": {f"t{number}": name for number, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text("{}")
    return directory


def opened(source: Path, most: int) -> str:
    command = [sys.executable, "-c", OPEN, str(source), str(most)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_limit_is_raised(source: Path) -> None:
    assert opened(source, 4096) == f"{SHARDS} {sum(range(SHARDS))}"


def test_where_it_may_not_be_a_line_says_what_to_do(source: Path) -> None:
    said = opened(source, 64)
    assert said.startswith(f"{source}/model-000")
    assert said.endswith(": too many files are open; raise the limit, as by `ulimit -n 4096`")
    assert "\n" not in said
