"""A HuggingFace hub on 127.0.0.1, so that the real client can be tested: repositories, and on demand trouble."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

Files = Mapping[str, bytes]


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@dataclass
class Stored:
    """A repository: the files of each commit, and the branches and tags."""

    commits: dict[str, Files] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        commit = self.names.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Rule:
    """What happens to the next `times` requests that match. `act` says whether it has answered."""

    pattern: re.Pattern[str]
    act: Callable[[Handler], bool]
    times: float

    def applies(self, request: str) -> bool:
        return self.times > 0 and self.pattern.search(request) is not None


class HubServer:
    """`requests` are those that came, as "GET /path"; those for a part of a file end in its range."""

    def __init__(self) -> None:
        self.stored: dict[str, Stored] = {}
        self.requests: list[str] = []
        self.rules: list[Rule] = []
        self.lock = threading.Lock()
        self.connections: list[socket.socket] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.running = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def publish(self, repository: str, files: Files, *names: str) -> str:
        """Add a commit, move the branches and tags `names` to it, and return it. Data sets are "datasets/org/name"."""
        stored = self.stored.setdefault(repository, Stored())
        commit = hashlib.sha1(repr((len(stored.commits), sorted(files.items()))).encode()).hexdigest()
        stored.commits[commit] = files
        stored.names |= dict.fromkeys(names, commit)
        return commit

    def rule(self, pattern: str, act: Callable[[Handler], bool], times: float = 1) -> None:
        self.rules.append(Rule(re.compile(pattern), act, times))

    def refuse(self, pattern: str, status: int, code: str = "", message: str = "", **headers: str) -> None:
        """Answer every request that matches with an error, as the hub words it in its headers."""
        said = {"X-Error-Code": code, "X-Error-Message": message} | {k.replace("_", "-"): v for k, v in headers.items()}
        said = {name: value for name, value in said.items() if value}
        self.rule(pattern, lambda handler: handler.answer(status, b'{"error": "lines\\nof it"}', said), float("inf"))

    def cut(self, pattern: str, after: int, times: float = 1) -> None:
        """Break the connection after so many bytes of a file."""
        self.rule(pattern, lambda handler: handler.cut(after), times)

    def on(self, pattern: str, act: Callable[[], object]) -> None:
        """Do something once, before a request that matches is answered as usual."""

        def first(handler: Handler) -> bool:
            act()
            return False

        self.rule(pattern, first)

    def taken(self, request: str) -> Rule | None:
        with self.lock:
            self.requests.append(request)
            found = next((rule for rule in self.rules if rule.applies(request)), None)
            if found is not None:
                found.times -= 1
        return found

    def fetched(self) -> list[str]:
        """The files that were asked for, by name."""
        return sorted(
            {
                request.split("/")[-1].split()[0]
                for request in self.requests
                if request.startswith("GET") and "/resolve/" in request
            }
        )

    def stop(self) -> None:
        if self.running:
            self.running = False
            self.server.shutdown()
            self.server.server_close()
            for connection in self.connections:
                with suppress(OSError):  # where the client has closed it
                    connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # something that the client asks of itself, once a day
            self.answer(404)
            return
        rule = self.hub.taken(" ".join([self.command, path, *self.headers.get_all("Range", [])]))
        if rule is not None and rule.act(self):
            return
        if (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path)) is not None:
            self.list_refs(found[1])
        elif (found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)) is not None:
            kind, name, what, revision = found.groups()
            self.describe(name if kind == "models" else f"datasets/{name}", what, revision or "main")
        elif (found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)) is not None:
            self.send_file(*found.groups())
        else:
            self.answer(404)

    do_HEAD = do_GET

    def find(self, repository: str, revision: str) -> tuple[str, Files] | None:
        stored = self.hub.stored.get(repository)
        if stored is None:
            self.answer(401, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})
            return None
        commit = stored.commit(revision)
        if commit is None:
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
            return None
        return commit, stored.commits[commit]

    def list_refs(self, repository: str) -> None:
        """Every name is a branch."""
        stored = self.hub.stored.get(repository)
        if stored is None:
            self.answer(401, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})
            return
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in stored.names.items()]
        self.answer(200, json.dumps({"branches": branches, "tags": [], "converts": []}).encode())

    def describe(self, repository: str, what: str | None, revision: str) -> None:
        found = self.find(repository, revision)
        if found is None:
            return
        commit, files = found
        if what == "tree":
            tree = [{"type": "file", "path": name, "size": len(data), "oid": etag(data)} for name, data in files.items()]
            self.answer(200, json.dumps(tree).encode())
        else:
            about = {"id": repository.removeprefix("datasets/"), "sha": commit, "private": False, "downloads": 0, "tags": []}
            about["siblings"] = [{"rfilename": name} for name in files]
            self.answer(200, json.dumps(about).encode())

    def send_file(self, repository: str, revision: str, name: str) -> None:
        found = self.find(repository, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            self.answer(
                404, headers={"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            )
            return
        data = files[name]
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None:
            self.answer(200, data, headers)
        else:
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self.answer(206, data[first:], headers)

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] = {}) -> bool:
        limit = getattr(self, "limit", len(body))
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:limit])
        if limit < len(body):
            self.close_connection = True
        return True

    def cut(self, after: int) -> bool:
        """The usual answer to this request will be cut short."""
        self.limit = after
        self.close_connection = True
        return False

    def log_message(self, format: str, *args: Any) -> None:
        pass


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def hub_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that the client in this process takes for the real one, with an empty cache; it does not wait between its tries."""
    hub = HubServer()
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "no-token"),
        "AGENT_HARNESSES_PATH": str(cache / "agents.json"),
    }.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    impatient = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    monkeypatch.setattr("huggingface_hub.file_download.time", impatient)
    huggingface_hub.close_session()  # a client looks for proxies when it is made
    try:
        yield hub
    finally:
        huggingface_hub.close_session()
        hub.stop()
