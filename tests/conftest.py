import hashlib
import os
from pathlib import Path
from typing import Protocol

import pytest
from filelock import FileLock

from make_smollm2 import make_smollm2
from make_tiny import make_tiny

DEMO = Path(__file__).resolve().parents[1] / ".demo"


def _kernel_sources() -> str:
    files = sorted((DEMO.parent / "quantizer" / "surogate_quantize" / "kernels").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# numba looks at a kernel's own file alone: a change in a file that it calls into would be tested as it was before.
os.environ.setdefault("NUMBA_CACHE_DIR", str(DEMO / f"numba-{_kernel_sources()}"))

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Every worker would start a torch thread per core, and they would spend their time waiting for each other.
    # Read when torch is first imported, which nothing above does.
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))


class MakeTiny(Protocol):
    def __call__(self, kind: str, dtype: str = ..., shards: int = ...) -> Path: ...


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M as a bf16 checkpoint, made once and kept for later sessions: never write into it."""
    DEMO.mkdir(exist_ok=True)
    with FileLock(DEMO / "smollm2-135m.lock"):
        return make_smollm2(DEMO / "smollm2-135m")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """A factory of tiny random checkpoints, each made once a session: never write into one."""
    root = tmp_path_factory.mktemp("tiny")

    def make(kind: str, dtype: str = "bfloat16", shards: int = 1) -> Path:
        out = root / f"{kind}-{dtype}-{shards}"
        return out if out.exists() else make_tiny(kind, out, dtype=dtype, shards=shards)

    return make
