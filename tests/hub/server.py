"""A small Hub in this process: the endpoints that huggingface_hub uses, over real HTTP, with faults on demand."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"
"""The one token that may read private and gated repositories, and write."""

LFS = (".safetensors", ".bin", ".png")


@dataclass
class Repo:
    """Commits, oldest first: each a hash and every file's bytes by path."""

    commits: list = field(default_factory=list)
    pull_requests: list = field(default_factory=list)
    messages: list = field(default_factory=list)
    private: bool = False
    gated: bool = False

    @property
    def files(self):
        return self.commits[-1][1] if self.commits else {}


@dataclass
class Fault:
    """What happens to requests whose `METHOD path` matches, the first `times` of them."""

    pattern: str
    kind: str
    times: int = 1 << 30
    seen: int = 0


class Hub:
    """The server; a context manager.

    Attributes:
        requests: `METHOD path` of all that came; `watch` is told each before it is answered.
    """

    def __init__(self):
        self.repos = {}
        self.objects = {}
        self.faults = []
        self.requests = []
        self.watch = lambda line: None
        self.stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, name, files, **attributes):
        """A repository with one commit; returns the commit's hash."""
        repo = self.repos.setdefault(name, Repo())
        for key, value in attributes.items():
            setattr(repo, key, value)
        return self.commit(repo, files)

    def add_directory(self, name, directory, **attributes):
        """The same with the files of a directory."""
        files = {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
        return self.add(name, files, **attributes)

    def commit(self, repo, files):
        sha = hashlib.sha1(repr((len(repo.commits), sorted(files))).encode()).hexdigest()
        repo.commits.append((sha, files))
        return sha

    def fail(self, pattern, kind, times=1 << 30):
        self.faults.append(Fault(pattern, kind, times))

    def fault_for(self, line):
        for fault in self.faults:
            if re.search(fault.pattern, line) and fault.seen < fault.times:
                fault.seen += 1
                return fault.kind
        return None

    def count(self, pattern):
        return sum(bool(re.search(pattern, line)) for line in self.requests)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionResetError, BrokenPipeError):
            self.close_connection = True

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _handle(self):
        self.target = urlsplit(self.path)
        self.query = parse_qs(self.target.query)
        path = unquote(self.target.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.watch(f"{self.command} {path}")
        self.authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.fault = self.hub.fault_for(f"{self.command} {path}")
        if self.fault in _REFUSALS:
            return self._refuse(*_REFUSALS[self.fault])
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, **match.groupdict())
        return self._refuse(404, {"X-Error-Message": f"no route {path}"})

    def _send(self, status, data=b"", headers=(), size=None):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status, headers):
        self._send(status, b"{}", headers)

    def _repo(self, name, *, write=False):
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.authorized):
            self._refuse(401 if not self.authorized else 404, {"X-Error-Code": "RepoNotFound"})
            return None
        if write and not self.authorized:
            self._refuse(403, {"X-Error-Message": "you have no write access"})
            return None
        return repo

    def _commit(self, repo, revision):
        if not repo.commits:
            return "0" * 40, {}
        found = next((c for c in repo.commits if c[0] == revision), repo.commits[-1] if revision == "main" else None)
        if found is None:
            self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
        return found

    def info(self, name, revision="main"):
        repo = self._repo(name)
        commit = repo and self._commit(repo, revision or "main")
        if commit:
            siblings = [self._entry(path, data, info=True) for path, data in commit[1].items()]
            self._json({"id": name, "sha": commit[0], "private": repo.private, "siblings": siblings, "tags": []})

    def _entry(self, path, data, *, info=False):
        lfs = {"size": len(data), "oid": sha256(data), "pointerSize": 130} if path.endswith(LFS) else None
        if info:
            lfs = lfs and {"size": len(data), "sha256": lfs["oid"], "pointerSize": 130}
            return {"rfilename": path, "size": len(data), "blobId": git_oid(data), **({"lfs": lfs} if lfs else {})}
        return {"type": "file", "path": path, "size": len(data), "oid": git_oid(data), **({"lfs": lfs} if lfs else {})}

    def tree(self, name, revision, path=""):
        repo = self._repo(name)
        commit = repo and self._commit(repo, revision)
        if commit:
            self._json([self._entry(p, data) for p, data in commit[1].items() if p.startswith(path or "")])

    def paths_info(self, name, revision):
        repo = self._repo(name)
        commit = repo and self._commit(repo, revision)
        if commit:
            asked = parse_qs(self.body.decode()).get("paths", [])
            self._json([self._entry(p, commit[1][p]) for p in asked if p in commit[1]])

    def resolve(self, name, revision, path):
        repo = self._repo(name)
        commit = repo and self._commit(repo, revision)
        if not commit:
            return None
        if repo.gated and not self.authorized:
            return self._refuse(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"})
        sha, files = commit
        if path not in files:
            return self._refuse(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        data = files[path]
        etag = sha256(data) if path.endswith(LFS) else git_oid(data)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if path.endswith(LFS):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if self.command == "HEAD":
            return self._send(200, b"", headers, size=len(data))
        if self.fault == "wrong bytes" and "Range" not in self.headers:
            data = data[:-4] + bytes(4 * [0x55])
        return self._body(data, headers)

    def _body(self, data, headers):
        status, start = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(data) - 1) + 1
            headers |= {"Content-Range": f"bytes {start}-{min(end, len(data)) - 1}/{len(data)}"}
            status, data = 206, data[start:end]
        if self.fault == "hang":
            self._send(status, data[: len(data) // 2], headers, size=len(data))
            self.hub.stopped.wait()
        if self.fault == "cut":
            self._send(status, data[: len(data) // 2], headers, size=len(data))
            self.close_connection = True
            return None
        return self._send(status, data, headers)

    def create(self):
        if not self.authorized:
            return self._refuse(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def validate_yaml(self):
        self._json({"errors": [], "warnings": []})

    def preupload(self, name, revision):
        repo = self._repo(name, write=True)
        if repo:
            files = json.loads(self.body)["files"]
            self._json({"files": [self._mode(repo, file["path"]) for file in files]})

    def _mode(self, repo, path):
        there = repo.files.get(path)
        oid = None if there is None else sha256(there) if path.endswith(LFS) else git_oid(there)
        mode = "lfs" if path.endswith(LFS) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch(self, name):
        repo = self._repo(name, write=True)
        if repo:
            objects = [dict(entry) for entry in json.loads(self.body)["objects"]]
            for entry in objects:
                if entry["oid"] not in self.hub.objects:
                    entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            self._json({"transfer": "basic", "objects": objects})

    def put(self, oid):
        if sha256(self.body) != oid:
            return self._refuse(400, {"X-Error-Message": "another hash"})
        self.hub.objects[oid] = self.body
        return self._send(200)

    def post_commit(self, name, revision):
        repo = self._repo(name, write=True)
        if not repo:
            return None
        files, header, head = dict(repo.files), {}, self._commit(repo, revision)[0]
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
                if value.get("parentCommit", head) != head:
                    return self._refuse(*_REFUSALS["changed"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/", "success": True}
        if self.query.get("create_pr"):
            repo.pull_requests.append((header, files))
            url = f"{self.hub.url}/{name}/discussions/{len(repo.pull_requests)}"
            return self._json({**answer, "commitOid": "f" * 40, "pullRequestUrl": url})
        repo.messages.append(header["summary"])
        return self._json({**answer, "commitOid": self.hub.commit(repo, files), "pullRequestUrl": None})


_REFUSALS = {
    "401": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "403": (403, {"X-Error-Message": "your token has no write access"}),
    "404": (404, {"X-Error-Code": "RepoNotFound"}),
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"}),
    "429": (429, {"Retry-After": "1"}),
    "503": (503, {}),
    "changed": (412, {"X-Error-Message": "the branch has moved"}),
}

_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_ROUTES = (
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", rf"/api/models/{_NAME}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ("GET HEAD", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.put),
    ("POST", rf"/api/models/{_NAME}/commit/(?P<revision>.+)", _Handler.post_commit),
)
