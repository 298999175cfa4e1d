"""A Hub on this machine: enough of its protocol for huggingface_hub, and a record of requests and bytes sent.

`HubServer` answers on 127.0.0.1. `Client` is one process whose HF_ENDPOINT it is (huggingface_hub reads that variable
once, when it is imported). The process runs command lines and snippets, so that tests import torch only once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
VALID_TOKEN = "hf_" + "valid"


@dataclass(frozen=True)
class Request:
    """One request as it arrived. path has no query; sent counts the bytes of the answer's body."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent: int


@dataclass
class Repo:
    """A repository. files: contents by name. revisions: its branches. A commit's name follows from its content."""

    files: dict[str, bytes]
    private: bool = False
    gated: bool = False
    revisions: tuple[str, ...] = ("main",)
    ranges: bool = True
    """Whether a range request gets the range, as from the Hub, or the whole file."""
    stall: str = ""
    """A file of which half is sent, then `half_sent` is set, and the rest is sent when `go_on` is set."""
    half_sent: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes to claim instead of the real ones, by file name."""
    status: int = 200
    """Status of every answer; not 200 for a Hub that is down."""

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    @classmethod
    def of(cls, folder: Path, **options: Any) -> Repo:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return cls(files, **options)


class HubServer:
    """Serves `repos` and appends every request to `requests`. A context manager that closes the server."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for repo in self.repos.values():
            repo.go_on.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def fetched(self, since: int = 0) -> dict[str, int]:
        """Bytes sent of each file, from request number `since` on."""
        sent: dict[str, int] = {}
        for request in self.requests[since:]:
            file = re.search(r"/(?:resolve|cdn)/\w+/(.+)", request.path)
            if file and request.sent:
                sent[file[1]] = sent.get(file[1], 0) + request.sent
        return sent


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a body after its headers would wait 40 ms

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            self.sent = 0
            try:
                self._answer(path)
            finally:
                token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
                hub.requests.append(Request(self.command, path, self.headers.get("Range"), token, self.sent))

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, path: str) -> None:
            what = re.fullmatch(r"(/api/models)?/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>[a-z]+)/(?P<rest>.+))?", path)
            repo = hub.repos.get(what["repo"]) if what else None
            token = self.headers.get("Authorization")
            if token and token != f"Bearer {VALID_TOKEN}":
                return self._fail(401, message="Invalid credentials in Authorization header")
            if what is None or repo is None or (repo.private and not token):
                return self._fail(401, "RepoNotFound")
            if repo.status != 200:
                return self._fail(repo.status)
            verb, (revision, _, file) = what["verb"], (what["rest"] or "main").partition("/")
            if revision not in (*repo.revisions, repo.commit):
                return self._fail(404, "RevisionNotFound")
            if path.startswith("/api/models/"):
                return self._send_json(_tree(repo) if verb == "tree" else _info(what["repo"], repo))
            if repo.gated and token is None:
                return self._fail(401, "GatedRepo")
            if file not in repo.files:
                return self._fail(404, "EntryNotFound")
            return self._send_file(what["repo"], repo, file, elsewhere=verb == "cdn")

        def _send_file(self, name: str, repo: Repo, file: str, elsewhere: bool) -> None:
            data = repo.files[file]
            large = file.endswith((".safetensors", ".gguf"))  # git-lfs: answered by another address
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": repo.commit}
            if large and not elsewhere:
                headers["X-Linked-ETag"], headers["X-Linked-Size"] = headers["ETag"], str(len(data))
                headers["Location"] = f"{hub.url}/{name}/cdn/{repo.commit}/{file}"
                return self._send(302, b"", headers)
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if part is None or not repo.ranges:
                return self._send(200, data, headers, half=repo if file == repo.stall else None)
            start, end = int(part[1]), min(len(data), int(part[2] or len(data) - 1) + 1)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{repo.sizes.get(file, len(data))}"
            return self._send(206, data[start:end], headers, half=repo if file == repo.stall else None)

        def _send_json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _fail(self, status: int, code: str = "", message: str = "") -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self._send(status, b"", {name: value for name, value in headers.items() if value})

        def _send(self, status: int, data: bytes, headers: dict[str, str], half: Repo | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            try:
                if half is not None:
                    self.wfile.write(data[: len(data) // 2])
                    half.half_sent.set()
                    half.go_on.wait(60)
                    data = data[len(data) // 2 :]
                self.wfile.write(data)
                self.sent = len(data)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

    return Handler


def _info(name: str, repo: Repo) -> dict[str, object]:
    return {"id": name, "modelId": name, "sha": repo.commit, "siblings": [{"rfilename": file} for file in repo.files]}


def _tree(repo: Repo) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for file, data in repo.files.items()
    ]


def environment(endpoint: str, home: Path) -> dict[str, str]:
    """Environment of a process whose Hub is `endpoint`, with an empty cache and no token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}


class Client:
    """A process that runs command lines and snippets. A context manager that ends the process."""

    def __init__(self, endpoint: str, home: Path):
        self.home = home
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub"],
            cwd=ROOT,
            env=environment(endpoint, home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("")

    def offmoe(self, *argv: object) -> dict[str, Any]:
        """Run a command line; returns its "status", "out" and "err"."""
        return self._ask({"argv": [str(arg) for arg in argv]})

    def python(self, code: str) -> dict[str, Any]:
        """Run `code`; returns its variable "result", or "error" and "message" of the OffmoeError that it raised."""
        return self._ask({"code": code})

    def _ask(self, request: dict[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process ended"
        return json.loads(answer)


def _serve_client() -> None:
    """The process of `Client`: one JSON object per line in, one out."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    from offmoe.cli import main
    from offmoe.errors import OffmoeError

    answers = sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        out, err = StringIO(), StringIO()
        names: dict[str, Any] = {"result": None}
        error = message = None
        with redirect_stdout(out), redirect_stderr(err):
            status = main(request["argv"]) if "argv" in request else None
            try:
                exec(request.get("code", ""), names)
            except OffmoeError as caught:
                error, message = type(caught).__name__, str(caught)
        answer = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "result": names["result"]}
        print(json.dumps({**answer, "error": error, "message": message}), file=answers, flush=True)


if __name__ == "__main__":
    _serve_client()
