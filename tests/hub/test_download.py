"""A model on the Hub as MODEL: what is fetched, what is refused, and what a fault looks like."""

import errno
import hashlib
import json
import signal
import subprocess
import sys
import time

import pytest
from hub.server import TOKEN
from huggingface_hub import file_download
from quantizer.checkpoints import CONFIG, check_artifact, contents, llama, write_checkpoint

from surogate_formats.hub_text import DownloadDiskFullError, translated
from surogate_quantize import make_options
from surogate_quantize import quantize as quantize_here
from surogate_quantize.hub.opening import SHARDS_AT_ONCE, open_source

NAME = "org/model"
FILES = {"tokenizer.json": "{}", "README.md": "a card", "modeling_custom.py": "raise SystemExit", "LICENSE": "free"}


@pytest.fixture
def source(tmp_path):
    directory = write_checkpoint(tmp_path / "local", shards=4)
    for name, text in FILES.items():
        (directory / name).write_text(text)
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    return directory


@pytest.fixture
def commit(hub, source):
    return hub.add_directory(NAME, source)


def leftovers(tmp_path):
    return [path for path in tmp_path.iterdir() if "-source-" in path.name]


def refused(done, status, *words):
    assert (done.returncode, done.stdout) == (status, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("Error: ")
    for word in words:
        assert word in done.stderr
    assert TOKEN not in done.stderr
    assert "-source-" not in done.stderr


def same_but_for_identity(out, other):
    """Whether two artifacts are equal, but for the source's name and revision."""
    one, two = contents(out), contents(other)
    manifests = [json.loads(found.pop("surogate.json")) for found in (one, two)]
    for manifest in manifests:
        del manifest["source"], manifest["revision"]
    return one == two and manifests[0] == manifests[1]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_model_on_the_hub_becomes_what_its_directory_becomes(hub, source, commit, quantize, tmp_path, name):
    done = quantize(NAME, "--format", name, "--out", "out", "-q")
    assert (done.returncode, done.stdout) == (0, "out\n"), done.stderr
    check_artifact(source, tmp_path / "out")
    quantize(source, "--format", name, "--out", "other", "-q")
    assert same_but_for_identity(tmp_path / "out", tmp_path / "other")
    manifest = json.loads((tmp_path / "out" / "surogate.json").read_text())
    assert (manifest["source"], manifest["revision"]) == (NAME, commit)
    assert not leftovers(tmp_path)


def test_only_what_is_used_is_fetched_and_nothing_is_kept(hub, commit, quantize, tmp_path):
    assert quantize(NAME, "--format", "nf4", "--out", "out", "-q").returncode == 0
    assert not hub.count(r"\.bin|\.py|README")
    assert (
        hub.count(rf"GET /{NAME}/resolve/{commit}/model-0000\d-of-00004.safetensors") == 8
    )  # a header and a file each
    assert not list((tmp_path / "hf-home").rglob("*.safetensors"))


def test_a_dry_run_reads_headers_alone(hub, source, commit, quantize, tmp_path):
    done = quantize(NAME, "--format", "nf4", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout == quantize(source, "--format", "nf4", "--dry-run", "--json").stdout
    assert hub.count("GET .*safetensors$") == 4
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("local", "hf-home")] == []


def test_kept_shards_are_used_again_and_never_written(hub, source, commit, quantize, tmp_path):
    assert quantize(NAME, "--format", "nf4", "--out", "out", "-q", "--keep-source").returncode == 0
    cache = tmp_path / "hf-home" / "hub" / "models--org--model"
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in cache.rglob("*.safetensors")}
    assert len(before) == 4
    asked = hub.count("GET .*safetensors$")
    assert quantize(NAME, "--format", "nf4", "--out", "again", "-q").returncode == 0
    assert hub.count("GET .*safetensors$") == asked
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in cache.rglob("*.safetensors")} == before


def test_offline_the_cache_is_enough_or_what_is_missing_is_named(hub, source, commit, quantize, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1"}
    refused(quantize(NAME, "--format", "nf4", "--out", "out", **offline), 1, "offline", f"hf download {NAME}")
    assert quantize(NAME, "--format", "nf4", "--out", "first", "-q", "--keep-source").returncode == 0
    asked = len(hub.requests)
    done = quantize(NAME, "--format", "nf4", "--out", "out", "-q", **offline)
    assert done.returncode == 0, done.stderr
    assert len(hub.requests) == asked
    assert contents(tmp_path / "out") == contents(tmp_path / "first")
    shard = next((tmp_path / "hf-home").rglob("model-00003-of-00004.safetensors"))
    shard.unlink()
    refused(quantize(NAME, "--format", "nf4", "--out", "other", **offline), 1, "model-00003-of-00004.safetensors isn't")


def test_the_hubs_hashes_are_recorded_on_request(hub, source, commit, quantize, tmp_path):
    done = quantize("org/model", "--format", "nf4", "--out", "out", "--hash-source")
    assert done.returncode == 0, done.stderr
    files = json.loads((tmp_path / "out" / "surogate.json").read_text())["files"]
    assert len(files) > 1
    for file in files:
        assert file["sha256"] == hashlib.sha256((source / file["name"]).read_bytes()).hexdigest()


def test_a_revision_is_resolved_once(hub, source, commit, quantize, tmp_path):
    changed = {name: array * 2 for name, array in llama(1).items()}
    write_checkpoint(tmp_path / "newer", changed)
    newer = hub.add_directory(NAME, tmp_path / "newer")
    assert quantize(NAME, "--format", "fp8", "--out", "old", "--revision", commit, "-q").returncode == 0
    assert quantize(NAME, "--format", "fp8", "--out", "new", "-q").returncode == 0
    for out, directory, sha in (("old", source, commit), ("new", tmp_path / "newer", newer)):
        check_artifact(directory, tmp_path / out)
        assert json.loads((tmp_path / out / "surogate.json").read_text())["revision"] == sha
    assert hub.count("resolve/main") == 0


def test_a_directory_wins_over_a_repository(hub, source, commit, quantize, tmp_path):
    local = write_checkpoint(tmp_path / "org" / "model", llama(7))
    asked = len(hub.requests)
    assert quantize(NAME, "--format", "fp8", "--out", "out", "-q").returncode == 0
    assert len(hub.requests) == asked
    check_artifact(local, tmp_path / "out")
    refused(
        quantize(NAME, "--format", "fp8", "--out", "out2", "--revision", "main"), 2, "--revision main", "leave it out"
    )


def test_a_token_opens_a_private_repository_and_is_seen_nowhere(hub, source, quantize, tmp_path):
    hub.add_directory(NAME, source, private=True)
    refused(quantize(NAME, "--format", "nf4", "--out", "out"), 1, NAME, "no such model on the Hub", "--token")
    for extra in ({"HF_TOKEN": TOKEN}, {}):
        arguments = () if extra else ("--token", TOKEN)
        done = quantize(NAME, "--format", "nf4", "--out", f"out{len(extra)}", *arguments, **extra)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
    assert all(TOKEN.encode() not in data for data in contents(tmp_path / "out1").values())
    assert contents(tmp_path / "out0") == contents(tmp_path / "out1")


@pytest.mark.parametrize(
    ("pattern", "kind", "words"),
    [
        ("GET /api", "401", ("refuses the token (401)", "--token")),
        ("GET /api", "404", ("no such directory, and no such model on the Hub",)),
        ("resolve.*config", "gated", ("gated; accept its conditions",)),
        ("resolve.*00002", "gated", ("gated; accept its conditions",)),
        ("GET /api", "429", ("429", "run it again in 1 seconds")),
        ("GET /api", "503", ("the Hub fails (503)",)),
        ("GET .*00003", "wrong bytes", ("org/model/model-00003-of-00004.safetensors", "and the Hub has")),
    ],
)
def test_a_fault_is_one_line_and_leaves_nothing(hub, commit, quantize, tmp_path, pattern, kind, words):
    hub.fail(pattern, kind)
    refused(quantize(NAME, "--format", "nf4", "--out", "out", "--token", TOKEN), 1, NAME, *words)
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(("kind", "times"), [("cut", 2), ("429", 1)])
def test_the_client_rides_out_what_passes(hub, source, commit, quantize, tmp_path, kind, times):
    hub.fail("(GET|HEAD) .*00002-of", "none", 1)  # the header's request is left alone
    hub.fail("GET .*00002-of", kind, times)
    done = quantize(NAME, "--format", "nf4", "--out", "out", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    check_artifact(source, tmp_path / "out")


def test_nobody_answers(hub, quantize):
    done = quantize(NAME, "--format", "nf4", "--out", "out", HF_ENDPOINT="http://127.0.0.1:9")
    refused(done, 1, NAME, "the Hub can't be reached", "HF_HUB_OFFLINE=1")


def test_an_unknown_revision_is_named(hub, commit, quantize):
    refused(quantize(NAME, "--format", "nf4", "--out", "out", "--revision", "v9"), 1, "no revision 'v9'", "--revision")


def test_pickles_are_refused_before_anything_is_downloaded(hub, quantize):
    hub.add(NAME, {"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": b"x", "tokenizer.json": b"{}"})
    refused(quantize(NAME, "--format", "nf4", "--out", "out"), 1, NAME, "only 'pytorch_model.bin'", "pickle runs code")
    assert hub.count("resolve") == 0


def test_an_artifact_is_no_source(hub, source, quantize, tmp_path):
    assert quantize(source, "--format", "fp8", "--out", "artifact", "-q").returncode == 0
    hub.add_directory("me/artifact", tmp_path / "artifact")
    refused(quantize("me/artifact", "--format", "nf4", "--out", "out"), 1, "me/artifact: already quantized")


def test_a_damaged_shard_in_the_cache_is_named(hub, commit, quantize, tmp_path):
    assert quantize(NAME, "--format", "nf4", "--out", "out", "-q", "--keep-source").returncode == 0
    blob = next((tmp_path / "hf-home").rglob("model-00002-of-00004.safetensors")).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    done = quantize(NAME, "--format", "nf4", "--out", "again")
    refused(done, 1, "model-00002-of-00004.safetensors", f"{blob}, which is damaged: remove it")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_download(hub, source, environment, tmp_path, number):
    hub.add_directory(NAME, source)
    hub.fail("(GET|HEAD) .*00003-of", "none", 1)
    hub.fail("GET .*00003-of", "hang", 1)
    command = [sys.executable, "-m", "surogate_quantize", NAME, "--format", "nf4", "--out", "out", "-q"]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while hub.count("GET .*00003-of") < 2:
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert stderr.endswith("nothing was left behind.\n")
    assert not leftovers(tmp_path)
    assert not (tmp_path / "out").exists()


def filled(path):
    """False too for a shard that is removed at this moment."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def test_the_disk_holds_two_shards_at_a_time(hub, quantize, tmp_path):
    """The one that is worked on and the next one, while a third is asked for."""
    write_checkpoint(tmp_path / "many", shards=9)
    hub.add_directory(NAME, tmp_path / "many")
    most = 0

    def look(line):
        nonlocal most
        most = max(most, sum(map(filled, tmp_path.glob(".out-source-*/shards/*.safetensors"))))

    hub.watch = look
    done = quantize(NAME, "--format", "nf4", "--out", "out", "-q")
    assert done.returncode == 0, done.stderr
    check_artifact(tmp_path / "many", tmp_path / "out")
    assert 1 <= most <= 2


def test_room_is_asked_for_the_shards_that_are_not_cached(our_hub, source, commit, tmp_path):
    sizes = sorted(path.stat().st_size for path in source.glob("*.safetensors"))
    where = {"revision": None, "token": None}
    with open_source(NAME, tmp_path / "out", **where, keep_source=False) as opened:
        assert opened.room == sum(sizes[-SHARDS_AT_ONCE:])
    quantize_here(NAME, tmp_path / "out", make_options("fp8", {}), keep_source=True)
    with open_source(NAME, tmp_path / "other", **where, keep_source=False) as opened:
        assert opened.room == 0


@pytest.mark.parametrize("keep_source", [False, True])
def test_a_full_disk_is_said_and_nothing_is_left(our_hub, commit, monkeypatch, tmp_path, keep_source):
    get = file_download.http_get

    def full(url, file, **keywords):
        if "00003-of" in url:
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        get(url, file, **keywords)

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(DownloadDiskFullError, match=f"^{NAME}: the disk is full while downloading .*free some space"):
        quantize_here(NAME, tmp_path / "out", make_options("nf4", {}), keep_source=keep_source)
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path)
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_token_in_an_error_of_huggingface_hub_is_not_passed_on():
    said = f"Bearer {TOKEN} was refused, hf_AbCdEfGhIjKlMnOp too: pip install hf_transfer"
    error = translated(RuntimeError(said), NAME, None)
    assert str(error) == f"{NAME}: can't be downloaded (<token> was refused, <token> too: pip install hf_transfer)"


def test_a_weight_that_cannot_be_quantized_is_named_by_its_repository(hub, quantize, tmp_path):
    tensors = llama()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    write_checkpoint(tmp_path / "bad", tensors, shards=2)
    hub.add_directory(NAME, tmp_path / "bad")
    done = quantize(NAME, "--format", "nf4", "--out", "out")
    refused(done, 1, f"{NAME}/model-0000", "tensor model.layers.1.mlp.up_proj.weight", "--skip")


def test_what_a_repository_calls_its_files_leads_nowhere_else(hub, source, quantize, tmp_path):
    files = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "../evil.safetensors"}}).encode()
    hub.add(NAME, files | {"../tokenizer.json": b"evil", "additional_chat_templates/../../evil.jinja": b"evil"})
    refused(quantize(NAME, "--format", "nf4", "--out", "out"), 1, "'../evil.safetensors' is not a plain relative path")
    assert not hub.count("evil")
