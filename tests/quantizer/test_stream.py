"""The stream's bounds: memory by the largest weight, and no file closed under a writing thread."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from surogate_quantize import make_options, quantize, shard

MIB = 1 << 20

MEASURE = """
import sys
from surogate_quantize import make_options, quantize
from surogate_quantize.summary import peak_rss
quantize(sys.argv[1], sys.argv[2], make_options("fp8", {}))
print(peak_rss())
"""


def write_pairs(folder, shape, layers):
    """A llama of nothing but gate and up projections."""
    folder.mkdir()
    weight = np.full(shape, 0.5, ml_dtypes.bfloat16)
    names = [f"model.layers.{i}.mlp.{leaf}_proj.weight" for i in range(layers) for leaf in ("gate", "up")]
    save_file(dict.fromkeys(names, weight), folder / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": layers, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def test_memory_is_bounded_by_the_largest_weight(tmp_path):
    shape = (20480, 5120)
    write_pairs(tmp_path / "source", shape, 2)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "source"), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 512 * MIB + 2 * shape[0] * shape[1]


def test_a_failure_waits_for_writers_before_it_closes_their_file(tmp_path, monkeypatch):
    write_pairs(tmp_path / "source", (64, 128), 2)
    events = []
    write, leave = shard.ShardWriter.write, shard.ShardWriter.__exit__

    def slow_write(self, name, chunks):
        digest = write(self, name, chunks)
        events.append("write")
        return digest

    def noted_exit(self, *error):
        events.append("close")
        leave(self, *error)

    def interrupt(made, todo):
        def after_first(tensor):
            raise KeyboardInterrupt

        return after_first

    monkeypatch.setattr(shard.ShardWriter, "write", slow_write)
    monkeypatch.setattr(shard.ShardWriter, "__exit__", noted_exit)
    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "source", tmp_path / "out", make_options("fp8", {}), watch=interrupt)
    assert events[-1] == "close"
    assert not (tmp_path / "out").exists()
