"""A small hub on loopback: the routes that `huggingface_hub` asks, a record of every request, and faults.

As on the real one, files of some size are kept by their sha256 and served by another host (a second port),
to which a redirect leads; small ones are git's, named by git's sha1. A gated repository shows its list of
files to everybody and the files themselves to those on its list.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PIECE = 16 << 10
LFS_FROM_BYTES = 4096
_API = re.compile(r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)/revision/(?P<revision>[^/]+)")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_CDN = re.compile(r"/cdn/(?P<sha256>[0-9a-f]{64})")


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a repository."""

    data: bytes

    @property
    def lfs(self) -> bool:
        """Whether another host serves it, by its sha256."""
        return len(self.data) >= LFS_FROM_BYTES

    @property
    def sha256(self) -> str:
        """Its name where it is large."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_sha1(self) -> str:
        """Its name in git."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        """The name of its blob in the client's cache."""
        return self.sha256 if self.lfs else self.git_sha1


@dataclasses.dataclass
class Repository:
    """Commits by their hash, and branches and tags that name them."""

    commits: dict[str, dict[str, File]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    gated: bool = False
    readers: set[str] = dataclasses.field(default_factory=set)
    """Tokens on a gated repository's list."""

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit means."""
        return revision if revision in self.commits else self.refs.get(revision)


@dataclasses.dataclass
class Request:
    """What came, and how much went back; it grows while the answer is sent."""

    method: str
    path: str
    host: str
    """"hub" or "cdn"."""
    range: str
    token: str
    status: int = 0
    sent_bytes: int = 0
    """Of the body, as far as they were sent."""


@dataclasses.dataclass
class Fault:
    """Something that goes wrong with the file, or the start of a path, `where` ("": all), `times` times.

    `kind`: "drop" cuts the connection at the file's byte `at`; "corrupt" changes the byte `at`; "stall" sends
    up to the byte `at`, and the rest once `released` is set; "hang_up" closes without an answer; "status"
    answers `status`.
    """

    kind: str
    where: str = ""
    times: int = 1
    at: int = 0
    status: int = 500
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    happened: int = 0

    def befalls(self, path: str) -> bool:
        """Whether a path, or one of several names with spaces between, is meant."""
        whole = self.where.startswith("/") and self.where in path
        return not self.where or whole or self.where in re.split(r"[ /]", path)


class HubServer:
    """The running hub. `url` is what HF_ENDPOINT takes."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        """Tokens that somebody has."""
        self.faults: list[Fault] = []
        self.answers: bytes | None = None
        """What the list of files is instead."""
        self.requests: list[Request] = []
        self.waiting = threading.Event()
        """Set once a request stalls."""
        self.released = threading.Event()
        """Ends what stalls."""
        self._lock = threading.Lock()
        self._hub, self._cdn = self._server("hub"), self._server("cdn")
        self.url = f"http://127.0.0.1:{self._hub.server_port}"
        self.cdn_url = f"http://127.0.0.1:{self._cdn.server_port}"

    def _server(self, host: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "host": host})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server

    def stop(self) -> None:
        """Ends it: from then on connections are refused."""
        self.released.set()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], *refs: str, gated: bool = False) -> str:
        """A commit of a repository with these files, under the branches and tags `refs`; gives its hash."""
        repository = self.repositories.setdefault(name, Repository())
        repository.gated = gated
        whole = {path: File(data) for path, data in files.items()}
        text = json.dumps([sorted((path, file.sha256) for path, file in whole.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        repository.commits[commit] = whole
        for ref in refs or ("main",):
            repository.refs[ref] = commit
        return commit

    def fail(self, kind: str, where: str = "", **rest: Any) -> Fault:
        """From now on this goes wrong."""
        fault = Fault(kind, where, **rest)
        self.faults.append(fault)
        return fault

    def of_file(self, name: str) -> list[Request]:
        """The requests that got bytes of a file, wherever they were asked for."""
        digests = {
            file.sha256
            for repository in self.repositories.values()
            for files in repository.commits.values()
            for path, file in files.items()
            if path == name
        }
        return [
            request
            for request in self.requests
            if request.path.rsplit("/", 1)[-1] in {name, *digests} and request.method == "GET"
        ]

    def sent(self, name: str) -> int:
        """Bytes of a file that were sent, over all requests."""
        return sum(request.sent_bytes for request in self.of_file(name) if request.status in (200, 206))

    def record(self, request: Request) -> None:
        """Remembers a request."""
        with self._lock:
            self.requests.append(request)

    def fault_of(self, path: str, kinds: tuple[str, ...]) -> Fault | None:
        """The fault that befalls this path now; it counts as having happened."""
        with self._lock:
            for fault in self.faults:
                if fault.kind in kinds and fault.happened < fault.times and fault.befalls(path):
                    fault.happened += 1
                    return fault
        return None


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A hub until the block's end."""
    server = HubServer()
    try:
        yield server
    finally:
        server.stop()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    host: str
    record: Request
    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """The record is enough."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.close_connection = True
        self.record = Request(self.command, path, self.host, self.headers.get("Range", ""), self._token)
        self.hub.record(self.record)
        # The client may have gone.
        with suppress(ConnectionError):
            self._route(path)

    def _route(self, path: str) -> None:
        # A revision's slashes come escaped; what was unescaped is matched from the outside in.
        raw = urllib.parse.urlsplit(self.path).path
        if self.host == "cdn":
            match = _CDN.fullmatch(raw)
            self._file(self._by_sha256(match["sha256"] if match else ""), "")
        elif fault := self.hub.fault_of(path, ("status", "hang_up")):
            if fault.kind == "status":
                self._error(fault.status, "", "made to fail", fault.headers)
        elif match := _API.fullmatch(raw):
            if found := self._found(match):
                self._info(urllib.parse.unquote(match["repo"]), *found)
        elif match := _RESOLVE.fullmatch(raw):
            if found := self._found(match):
                self._resolve(urllib.parse.unquote(match["file"]), *found)
        else:
            self._error(404, "", "no such route")

    def _found(self, match: re.Match[str]) -> tuple[Repository, str] | None:
        if self._token and self._token not in self.hub.tokens:
            return self._error(401, "", "Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(urllib.parse.unquote(match["repo"]))
        if repository is None:
            return self._error(404 if self._token else 401, "RepoNotFound", "Repository not found")
        revision = urllib.parse.unquote(match["revision"])
        if (commit := repository.commit(revision)) is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _info(self, name: str, repository: Repository, commit: str) -> None:
        siblings: list[dict[str, Any]] = []
        for path, file in repository.commits[commit].items():
            entry = {"rfilename": path, "size": len(file.data), "blobId": file.git_sha1}
            if file.lfs:
                entry["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": 130}
            siblings.append(entry)
        body = {"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings}
        text = json.dumps(body | {"gated": "manual" if repository.gated else False, "tags": []}).encode()
        text = text if self.hub.answers is None else self.hub.answers
        self._begin(200, {"Content-Type": "application/json", "Content-Length": str(len(text))})
        self._body(text)

    def _resolve(self, name: str, repository: Repository, commit: str) -> None:
        if repository.gated and self._token not in repository.readers:
            self._error(403 if self._token else 401, "GatedRepo", "Access to this model is restricted")
            return
        file = repository.commits[commit].get(name)
        if file is None:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        elif file.lfs:
            self._begin(
                302,
                {
                    "Location": f"{self.hub.cdn_url}/cdn/{file.sha256}",
                    "X-Repo-Commit": commit,
                    "X-Linked-Etag": f'"{file.sha256}"',
                    "X-Linked-Size": str(len(file.data)),
                    "Content-Length": "0",
                },
            )
        else:
            self._file(file, commit)

    def _by_sha256(self, sha256: str) -> File | None:
        for repository in self.hub.repositories.values():
            for files in repository.commits.values():
                for file in files.values():
                    if file.sha256 == sha256:
                        return file
        return None

    def _file(self, file: File | None, commit: str) -> None:
        if file is None:
            self._error(404, "", "no such file")
            return
        names = " ".join(
            path
            for repository in self.hub.repositories.values()
            for files in repository.commits.values()
            for path, other in files.items()
            if other == file
        )
        if fault := self.hub.fault_of(names, ("status", "hang_up") if self.host == "cdn" else ()):
            if fault.kind == "status":
                self._error(fault.status, "", "made to fail", fault.headers)
            return
        data, total = file.data, len(file.data)
        start, end = 0, total
        headers = {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if commit:
            headers["X-Repo-Commit"] = commit
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or total - 1) + 1, total)
            if start >= total:
                self._error(416, "", "range", {"Content-Range": f"bytes */{total}"})
                return
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        headers["Content-Length"] = str(end - start)
        fault = self.hub.fault_of(names, ("drop", "corrupt", "stall")) if self.command == "GET" else None
        if fault and fault.kind == "corrupt":
            data = data[: fault.at] + bytes([data[fault.at] ^ 1]) + data[fault.at + 1 :]
        until = min(end, fault.at) if fault and fault.kind in ("drop", "stall") else end
        self._begin(206 if wanted else 200, headers)
        if self.command == "GET":
            self._body(data[start:until])
        if fault and fault.kind == "stall":
            self.hub.waiting.set()
            self.hub.released.wait(60)
            self._body(data[until:end])

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def _body(self, data: bytes) -> None:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self.record.sent_bytes += len(piece)
            self.connection.sendall(piece)

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        text = json.dumps({"error": message}).encode()
        extra = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._begin(status, {"Content-Type": "application/json", "Content-Length": str(len(text)), **extra})
        if self.command != "HEAD":
            self._body(text)
