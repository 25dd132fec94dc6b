"""A Hugging Face Hub on the loopback, with faults on demand and a record of every request."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal, NoReturn
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

if TYPE_CHECKING:
    import pytest

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
LFS_FROM_BYTES = 10_000_000
CHUNK_BYTES = 64 * 1024
DROPS = ("cut", "reset", "stall")

REPO, REVISION, FILE = r"(?P<repo>[^/]+(?:/[^/]+)?)", r"(?P<revision>[^/]+)", r"(?P<path>.+)"
ROUTES = (
    re.compile(rf"/api/models/{REPO}(?:/(?P<verb>auth-check|revision|tree)(?:/{REVISION}(?:/{FILE})?)?)?"),
    re.compile(rf"/api/(?P<verb>resolve-cache)/models/{REPO}/{REVISION}/{FILE}"),
    re.compile(rf"/{REPO}/(?P<verb>resolve)/{REVISION}/{FILE}"),
)


@dataclass
class Request:
    """One request and how it was answered; `file` is the path in the repository of a file asked for."""

    listener: str  # "hub" or "cdn"
    method: str
    path: str  # without the query
    range: str | None
    had_auth: bool
    repo: str | None = None
    file: str | None = None
    status: int = 0  # 0: the connection was dropped before any answer
    sent: int = 0  # bytes of body


@dataclass
class Fault:
    """What goes wrong with requests whose path, or file in the repository, matches the pattern `path`.

    Of the requests it could strike, it lets the first `skip` pass and strikes the next `times`.

    - "status" answers `status`, with Retry-After: `retry_after`; "expire" says that the link to the CDN has expired.
    - "cut" closes the connection, "reset" resets it and "stall" falls silent: before any answer (whatever was asked,
      HEAD included), or when `after` bytes of a longer body have been sent.
    - "slow" waits `delay_s` before each chunk of a body, "corrupt" flips the byte at `offset` of the file in bodies
      that hold it, and "wrong_range" sends the whole file to who asked for a part.

    What strikes before the answer comes first; what strikes a body strikes answers to GET that are no errors.
    """

    kind: Literal["status", "expire", "cut", "reset", "stall", "slow", "corrupt", "wrong_range"]
    path: str = "*"
    where: Callable[[Request], bool] = lambda request: True
    skip: int = 0
    times: float = 1
    status: int = 503
    retry_after: int | None = None
    after: int | None = None
    delay_s: float = 0.1
    offset: int = 0
    seen: int = field(default=0, init=False)

    def could_strike(self, request: Request, body: range | None) -> bool:
        """Before the answer, where `body` is None, or else on an answer with these bytes of its file."""
        if not (fnmatchcase(request.path, self.path) or fnmatchcase(request.file or "", self.path)):
            return False
        if self.kind == "slow":
            fits = bool(body)
        elif self.kind == "corrupt":
            fits = body is not None and self.offset in body
        elif self.kind == "wrong_range":
            fits = body is not None and request.range is not None
        elif self.after is not None:
            fits = body is not None and self.after < len(body)
        else:
            fits = body is None and (self.kind != "expire" or request.listener == "cdn")
        return fits and self.where(request)


@dataclass
class _File:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        """What git stores the file under: a large file is stored as its pointer."""
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    def info(self, blob_key: str, hash_key: str) -> dict:
        """Its JSON; the Hub's two listings differ in their names of hashes."""
        lfs = {hash_key: self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return {"size": len(self.data), blob_key: self.blob_id, **({"lfs": lfs} if self.lfs else {})}


@dataclass
class _Repo:
    private: bool
    gated: bool
    lfs: tuple[str, ...]
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, _File]] = field(default_factory=dict)

    def file(self, path: str, data: bytes) -> _File:
        return _File(data, path.endswith(self.lfs) or len(data) >= LFS_FROM_BYTES)


class _RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits until its headers are acknowledged
    server: _Listener  # type: ignore[assignment]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url, self.hub = urlsplit(self.path), self.server.hub
        self.query = dict(parse_qsl(url.query))
        has_auth = "Authorization" in self.headers
        self.record = Request(self.server.name, self.command, url.path, self.headers["Range"], has_auth)
        self.hub.requests.append(self.record)
        try:
            if self.record.listener == "cdn":
                self.answer_from_cdn()
            else:
                self.answer_from_hub()
        except _RefusalError as refusal:
            self.reply(refusal.status, refusal.headers, json.dumps({"error": str(refusal)}).encode())

    do_HEAD = do_GET  # noqa: N815

    def answer_from_cdn(self) -> None:
        self.record.repo, self.record.file = self.query.get("repo"), self.query.get("file")
        self.fail_early()
        sha256, expires = self.record.path.removeprefix("/"), self.query.get("expires", "")
        if self.record.had_auth:
            raise _RefusalError(400, "InvalidArgument: Only one auth mechanism allowed")
        if self.query.get("signature") != self.hub.sign(sha256, expires):
            raise _RefusalError(403, "SignatureDoesNotMatch")
        if float(expires) <= time.time():
            raise _RefusalError(403, "AccessDenied: Request has expired")
        self.reply(200, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}, self.hub.blobs[sha256], ranged=True)

    def answer_from_hub(self) -> None:
        route = next((match for pattern in ROUTES if (match := pattern.fullmatch(self.record.path))), None)
        named = {"repo": None, "verb": None, "revision": None, "path": None} | (route.groupdict() if route else {})
        repo_id, verb, path = named["repo"] or "", named["verb"], unquote(named["path"] or "")
        is_file = verb in ("resolve", "resolve-cache")
        self.record.repo, self.record.file = named["repo"], path if is_file else None
        self.fail_early()
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token not in ("", self.hub.token, self.hub.other_token):
            raise _RefusalError(401, "Invalid credentials in Authorization header")
        if self.record.path == "/api/whoami-v2" and token:
            return self.reply_json({"type": "user", "name": "member" if token == self.hub.token else "other"})
        repo = self.admit(repo_id, token, to_contents=is_file or verb == "auth-check")
        revision = unquote(named["revision"] or "main")
        full = (commit for commit in repo.commits if len(revision) >= 7 and commit.startswith(revision))
        commit = repo.branches.get(revision) or next(full, None)
        if commit is None:
            raise _RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = repo.commits[commit]
        if is_file:
            self.answer_with_file(repo_id, repo, commit, path)
        elif verb == "tree":
            if path or self.query.get("recursive") != "true":
                raise _RefusalError(501, "This server lists whole trees only")
            self.reply_json([{"type": "file", "path": path, **file.info("oid", "oid")} for path, file in files.items()])
        elif verb == "auth-check":
            self.reply_json({})
        else:
            infos = {
                path: file.info("blobId", "sha256") if "blobs" in self.query else {} for path, file in files.items()
            }
            siblings = [{"rfilename": path, **info} for path, info in infos.items()]
            about = {"private": repo.private, "gated": "manual" if repo.gated else False, "siblings": siblings}
            self.reply_json({"id": repo_id, "sha": commit, **about})

    def admit(self, repo_id: str, token: str, to_contents: bool) -> _Repo:
        """The repository, if a request with this token may know of it, and open its files."""
        repo, is_member = self.hub.repos.get(repo_id), token == self.hub.token
        if repo is None or (repo.private and not is_member):
            if token:
                raise _RefusalError(404, "Repository not found", "RepoNotFound")
            raise _RefusalError(401, "Invalid username or password.", "RepoNotFound")
        if repo.gated and to_contents and not is_member:
            restricted = f"Access to model {repo_id} is restricted"
            if token:
                ask = f"Visit https://huggingface.co/{repo_id} to ask for access."
                raise _RefusalError(403, f"{restricted} and you are not in the authorized list. {ask}", "GatedRepo")
            login = "You must have access to it and be authenticated to access it. Please log in."
            raise _RefusalError(401, f"{restricted}. {login}", "GatedRepo")
        return repo

    def answer_with_file(self, repo_id: str, repo: _Repo, commit: str, path: str) -> None:
        headers, file = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}, repo.commits[commit].get(path)
        if file is None:
            raise _RefusalError(404, "Entry not found", "EntryNotFound", headers)
        if file.lfs:
            link = self.hub.cdn_link(file.sha256, repo_id, path)
            headers |= {"X-Linked-Size": str(len(file.data)), "X-Linked-ETag": f'"{file.sha256}"', "Location": link}
            self.reply(302, headers, b"Found")
        elif file.data and "/resolve/" in self.record.path and not (repo.private or repo.gated):
            headers["Location"] = f"/api/resolve-cache/models/{repo_id}/{commit}/{quote(path)}"
            self.reply(307, headers, b"Temporary Redirect")
        else:
            self.reply(200, {**headers, "ETag": f'"{file.blob_id}"'}, file.data, ranged=True)

    def reply_json(self, answer: object) -> None:
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def reply(self, status: int, headers: dict[str, str], data: bytes, ranged: bool = False) -> None:
        """Answer with `data`, or the part of it that a Range asks for, as far as a fault lets it through."""
        body, fault = range(len(data)), None
        if ranged and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)|bytes=-(\d+)", self.record.range or "")):
            start, last, n_last = asked.groups()
            body = body[max(len(data) - int(n_last), 0) :] if n_last else body[int(start) : int(last or len(data)) + 1]
            status = 206 if body else 416
        if status in (200, 206) and self.record.method == "GET":
            fault = self.hub.next_fault(self.record, body)
        kind = fault and fault.kind
        if kind == "wrong_range":
            status, body = 200, range(len(data))
        if status in (206, 416):
            part = f"{body.start}-{body.stop - 1}" if body else "*"
            headers["Content-Range"] = f"bytes {part}/{len(data)}"
        self.record.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.record.method == "HEAD":
            return
        content = bytearray(data[body.start : body.stop])
        if fault and kind == "corrupt":
            content[fault.offset - body.start] ^= 0xFF
        if fault and kind in DROPS:
            del content[fault.after :]
        for at in range(0, len(content), CHUNK_BYTES):
            if fault and kind == "slow":
                self.server.closing.wait(fault.delay_s)
            chunk = content[at : at + CHUNK_BYTES]
            self.record.sent += len(chunk)
            self.wfile.write(chunk)
        if fault and kind in DROPS:
            self.drop(fault)

    def fail_early(self) -> None:
        """Let a fault strike before the answer."""
        if fault := self.hub.next_fault(self.record, None):
            if fault.kind == "expire":
                raise _RefusalError(403, "AccessDenied: Request has expired")
            if fault.kind == "status":
                retry = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                raise _RefusalError(fault.status, "A fault was asked for", headers=retry)
            self.drop(fault)

    def drop(self, fault: Fault) -> NoReturn:
        if fault.kind == "stall":
            self.server.closing.wait()
        elif fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()  # holds the socket open, too
            self.connection.close()
        raise ConnectionAbortedError


class _Listener(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, name: str, port: int) -> None:
        self.hub, self.name, self.closing = hub, name, threading.Event()
        self.connections: set = set()
        super().__init__(("127.0.0.1", port), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), OSError):  # clients may leave at any time
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self.closing.set()
        for connection in list(self.connections):  # else they would live on, kept alive
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class HubServer:
    """A Hub at `url` with a CDN for the contents of large (LFS) files at `cdn_url`; closes as a context manager.

    `token` opens what is private or gated, `other_token` is valid but opens neither, and other tokens are refused
    everywhere. `requests` is the record of requests; `faults` are consulted in their order, one strikes at a time.
    """

    def __init__(self) -> None:
        self.token, self.other_token, self.link_lifetime_s = "hf_member", "hf_other", 3600.0
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.repos: dict[str, _Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self._lock, self._secret = threading.Lock(), os.urandom(16)
        self._ports = {"hub": 0, "cdn": 0}
        self._listeners: list[_Listener] = []
        self._close_client: Callable[[], None] = lambda: None
        self.up()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.down()
        self._close_client()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports['hub']}"

    @property
    def cdn_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['cdn']}"

    def up(self) -> None:
        """Listen, after `down` at the same addresses as before."""
        self._listeners = [_Listener(self, name, port) for name, port in self._ports.items()]
        self._ports = {listener.name: listener.server_address[1] for listener in self._listeners}

    def down(self) -> None:
        """Drop all connections and refuse new ones."""
        while self._listeners:
            self._listeners.pop().stop()

    def add_repo(
        self,
        repo_id: str,
        directory: Path,
        revision: str = "main",
        *,
        private: bool = False,
        gated: bool = False,
        lfs: tuple[str, ...] = LFS_SUFFIXES,
    ) -> str:
        """Serve what `directory` holds now (kept in memory) as a branch; returns the commit.

        Files whose names end in one of `lfs`, and all of 10 MB and more, are LFS files.
        """
        repo = self.repos.setdefault(repo_id, _Repo(private, gated, lfs))
        paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
        return self._commit(repo, revision, {name: repo.file(name, paths[name].read_bytes()) for name in sorted(paths)})

    def replace_file(self, repo_id: str, path: str, data: bytes, revision: str = "main") -> str:
        """Commit new contents of one file to a branch; the old commit stays. Returns the new commit."""
        repo = self.repos[repo_id]
        files = repo.commits[repo.branches[revision]]
        return self._commit(repo, revision, {**files, path: repo.file(path, data)})

    def _commit(self, repo: _Repo, revision: str, files: dict[str, _File]) -> str:
        listing = "\n".join(f"{file.blob_id} {path}" for path, file in files.items())
        commit = hashlib.sha1(listing.encode()).hexdigest()
        self.blobs |= {file.sha256: file.data for file in files.values() if file.lfs}
        repo.commits[commit] = files
        repo.branches[revision] = commit
        return commit

    def sign(self, sha256: str, expires: str) -> str:
        return hmac.new(self._secret, f"{sha256} {expires}".encode(), "sha256").hexdigest()

    def cdn_link(self, sha256: str, repo_id: str, path: str) -> str:
        """A link that opens without a token, for `link_lifetime_s`."""
        expires = str(time.time() + self.link_lifetime_s)
        query = {"repo": repo_id, "file": path, "expires": expires, "signature": self.sign(sha256, expires)}
        return f"{self.cdn_url}/{sha256}?{urlencode(query)}"

    def next_fault(self, request: Request, body: range | None) -> Fault | None:
        """The first fault that strikes this request, counted off."""
        with self._lock:
            for fault in self.faults:
                if fault.could_strike(request, body):
                    fault.seen += 1
                    if fault.skip < fault.seen <= fault.skip + fault.times:
                        return fault
        return None

    def fetched(self, pattern: str = "*") -> Counter[str]:
        """Bytes of contents sent of each file whose path in its repository matches."""
        sent: Counter[str] = Counter()
        for request in self.requests:
            if request.file and request.status in (200, 206) and fnmatchcase(request.file, pattern):
                sent[request.file] += request.sent
        return +sent

    def environment(self, cache_dir: Path, token: str | None = None, timeout_s: int = 2) -> dict[str, str]:
        """The environment of a process whose `huggingface_hub` talks to this server, and to nobody else."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache_dir),
            "HF_HUB_CACHE": str(cache_dir),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_ETAG_TIMEOUT": str(timeout_s),
            "HF_HUB_DOWNLOAD_TIMEOUT": str(timeout_s),
            "no_proxy": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }
        return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | ours

    def patch(
        self, monkeypatch: pytest.MonkeyPatch, cache_dir: Path, token: str | None = None, timeout_s: float = 2.0
    ) -> list[float]:
        """Point this process' `huggingface_hub` here; instead of waiting to retry, it adds the seconds to the result.

        It also keeps what it has got in smaller steps than 10 MiB, so that small files show where it resumes.
        """
        import huggingface_hub
        from huggingface_hub import constants, file_download, hf_api
        from huggingface_hub.utils import _http

        environment = self.environment(cache_dir, token)
        for name in os.environ.keys() - environment.keys():
            monkeypatch.delenv(name)
        for name, value in environment.items() - os.environ.items():
            monkeypatch.setenv(name, value)
        # It read its environment when it was imported.
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache_dir),
            "HF_TOKEN_PATH": str(cache_dir / "token"),
            "HF_STORED_TOKENS_PATH": str(cache_dir / "stored_tokens"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_ETAG_TIMEOUT": timeout_s,
            "HF_HUB_DOWNLOAD_TIMEOUT": timeout_s,
            "DOWNLOAD_CHUNK_SIZE": CHUNK_BYTES,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", timeout_s)
        waits: list[float] = []
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))
        huggingface_hub.close_session()
        self._close_client = huggingface_hub.close_session
        return waits
