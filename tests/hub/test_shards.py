"""Shards that come and go: what a run that ends leaves undone, and what a shard that is done leaves on the disk."""

import os
import threading
from collections import Counter
from contextlib import suppress

import pytest

from surogate_quantize.hub.errors import StoppedError
from surogate_quantize.hub.repository import HubFile
from surogate_quantize.hub.shards import HubShards


class Repository:
    """Downloads zeros, or waits for the end of the run in the middle of a download."""

    name = "org/model"

    def __init__(self, *, slow=False):
        self.stop = threading.Event()
        self.slow = slow
        self.begun = threading.Event()
        self.written = []

    def cached(self, file):
        return None

    def download(self, file, folder):
        self.begun.set()
        path = folder / file.name
        if self.slow:
            self.stop.wait()
            path.write_bytes(b"a last piece")
            self.written.append(file.name)
            raise StoppedError("the run was ended")
        path.write_bytes(bytes(file.size))
        self.written.append(file.name)
        return path


def shards_of(repository, folder, place=lambda name, path: None):
    shards = HubShards(repository, [HubFile(name, 100, None, None) for name in "ab"], folder, place)
    shards.expect(Counter(a=1, b=1))
    return shards


def test_a_run_that_ends_starts_no_download(tmp_path):
    repository = Repository()
    shards = shards_of(repository, tmp_path)
    repository.stop.set()
    with pytest.raises(StoppedError):
        shards.need("a")
    shards.give_up()  # waits for the threads
    assert not repository.begun.is_set()


def test_giving_up_waits_for_a_download_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr("surogate_quantize.hub.shards.LAST_WAIT", 60)
    repository = Repository(slow=True)
    shards = shards_of(repository, tmp_path)

    def need():
        with suppress(StoppedError):
            shards.need("a")

    needing = threading.Thread(target=need, daemon=True)
    needing.start()
    assert repository.begun.wait(60)
    shards.give_up()
    assert repository.written  # nothing is written into the folder after this
    needing.join(60)


def test_a_shard_that_is_done_leaves_no_bytes_behind_an_open_descriptor(tmp_path):
    descriptors = {}

    def place(name, path):
        descriptors[name] = os.open(path, os.O_RDONLY)

    shards = shards_of(Repository(), tmp_path, place)
    shards.need("a")
    assert os.fstat(descriptors["a"]).st_size == 100
    shards.settled("a")
    assert os.fstat(descriptors["a"]).st_size == 0
    assert not (tmp_path / "a").exists()
    shards.give_up()
    for descriptor in descriptors.values():
        os.close(descriptor)
