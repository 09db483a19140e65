import os

import pytest
import torch
import transformers
from runtime.artifacts import tiny_llama, write_artifact
from runtime.experts import ROUTERS, ByExpert, dense_model
from runtime.layers import KINDS

from surogate_load.errors import TransformersTooOldError


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips what the installed transformers is too old for: layout bitsandbytes, of which the error names the bound."""
    try:
        return (yield)
    except TransformersTooOldError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", autouse=True)
def _small_and_quiet():
    torch.set_num_threads(1)  # the tensors are tiny: a second thread would only be waited for
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _own_compiler_cache(tmp_path_factory):
    """On a GPU the compiler times its choices: a worker that reads another's may compile one layer in two ways."""
    if torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    """A factory of tiny Llama artifacts by kind, each made once a session: never write into one."""
    made = {}

    def make(kind, amax=None, **changes):
        key = (kind, amax, *sorted(changes.items()))
        if key not in made:
            made[key] = write_artifact(tiny_llama(**changes), tmp_path_factory.mktemp(kind), KINDS[kind], amax=amax)
        return made[key]

    return make


@pytest.fixture(scope="session")
def expert_artifact(tmp_path_factory):
    """The same of tiny mixtures of experts, by family, kind and what is kept beside the routers."""
    made = {}

    def make(family, kind="nf4", keep=()):
        key = (family, kind, keep)
        if key not in made:
            model, folder = ByExpert(dense_model(family)), tmp_path_factory.mktemp("experts")
            made[key] = write_artifact(model, folder, KINDS[kind], keep=(*ROUTERS, *keep))
        return made[key]

    return make
