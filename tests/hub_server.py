"""A small Hugging Face Hub on this machine, for the real huggingface_hub client; it forgets all at the end."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
WRITER, READER = "hf_writer", "hf_reader"  # tokens
BINARY = (".safetensors", ".bin", ".pth")  # go by LFS


@dataclass
class Repository:
    """Every commit with all its files, and the branches; gated or private ones are read with a token only."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {})

    def commit(self, branch: str, files: Files) -> str:
        sha = hashlib.sha1(f"{branch} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, branch: str = "main") -> Files:
        return self.commits[self.branches[branch]]


class Hub:
    """The repositories by name, the requests that came, and `broken`: a status that every answer has."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: Files = {}  # by sha256
        self.requests: list[str] = []
        self.broken = 0
        self.endpoint = ""

    def add(self, name: str, files: Files, private: bool = False, gated: bool = False) -> Repository:
        self.repositories[name] = Repository(private, gated)
        self.repositories[name].commit("main", files)
        return self.repositories[name]


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class RefusalError(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *words: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.hub.broken:
                raise RefusalError(self.hub.broken)
            self.route(path, body)
        except RefusalError as refusal:
            self.send(b"{}", refusal.status, {"X-Error-Code": refusal.code} if refusal.code else {})

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            self.hub.large[found[1]] = body
            return self.send(b"")
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.send_json(
                {"transfer": "basic", "objects": [self.upload(o) for o in json.loads(body)["objects"]]}
            )
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = self.find(found[1])
            if repository.gated and self.token() is None:
                raise RefusalError(403, "GatedRepo")
            return self.resolve(repository, found[2], found[3])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path):
            return self.api(found[1], found[2] or "revision", found[3] or "main", body)
        raise RefusalError(404)

    def api(self, name: str, what: str, revision: str, body: bytes) -> None:
        repository = self.find(name)
        if what in ("commit", "preupload", "branch"):
            self.check_writer()
        if what == "branch":
            if revision in repository.branches:
                raise RefusalError(409)
            repository.branches[revision] = repository.branches["main"]
            return self.send_json({})
        sha, files = self.commit_of(repository, revision)
        if what == "revision":
            siblings = [{"rfilename": path, **about(path, content)} for path, content in files.items()]
            return self.send_json({"id": name, "sha": sha, "private": repository.private, "siblings": siblings})
        if what == "tree":
            return self.send_json([{"type": "file", "path": path, **about(path, each)} for path, each in files.items()])
        if what == "preupload":
            asked = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "lfs" if path.endswith(BINARY) else "regular"} for path in asked]
            return self.send_json({"files": [each | {"shouldIgnore": False} for each in modes]})
        assert what == "commit"
        files = dict(files)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.hub.large[line["value"]["oid"]]
        sha = repository.commit(revision, files)
        return self.send_json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    def create(self, asked: dict[str, Any]) -> None:
        self.check_writer()
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return self.send_json(url, 409)
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.hub.repositories[name] = Repository(private=private)
        return self.send_json(url)

    def upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        return asked | {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}}}

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        sha, files = self.commit_of(repository, revision)
        if path not in files:
            raise RefusalError(404, "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}
        self.send(files[path], headers=headers)

    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def find(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.token() not in (WRITER, READER)):
            raise RefusalError(404 if self.token() else 401, "RepoNotFound")
        return repository

    def check_writer(self) -> None:
        if self.token() != WRITER:
            raise RefusalError(403 if self.token() else 401)

    def commit_of(self, repository: Repository, revision: str) -> tuple[str, Files]:
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise RefusalError(404, "RevisionNotFound")
        return sha, repository.commits[sha]

    def send_json(self, content: object, status: int = 200) -> None:
        self.send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def about(path: str, content: bytes) -> dict[str, Any]:
    """Return what the Hub's listings say of a file."""
    found: dict[str, Any] = {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(BINARY):
        found["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
        found["lfs"]["oid"] = found["lfs"]["sha256"]
    return found | {"blobId": found["oid"]}
