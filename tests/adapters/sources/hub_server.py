"""A hub on loopback: the few routes of the Hugging Face hub that `snapshot_download` asks for.

Repositories live in memory: {"org/name": {"main" or a tag: {file: bytes}}}. A commit is the hash of its files.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Repositories = dict[str, dict[str, dict[str, bytes]]]


class HubServer(ThreadingHTTPServer):
    """`url`; `requests`: (method, path); `gated`: repositories that answer 403; `cut`: weights end half-way."""

    daemon_threads = True

    def __init__(self, repositories: Repositories):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[tuple[str, str]] = []
        self.gated: set[str] = set()
        self.cut = False
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = ("/".join(parts[2:4]), parts[4:]) if api else ("/".join(parts[:2]), parts[2:])
        revisions = self.server.repositories.get(repo)
        if revisions is None:
            return self._error(404, "RepoNotFound", f"Repository {repo} not found")
        if repo in self.server.gated:
            return self._error(403, "GatedRepo", f"Access to {repo} is restricted")
        what, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        files = next((f for name, f in revisions.items() if revision in (name, commit_of(f))), None)
        if files is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self._json(
                {"id": repo, "sha": commit_of(files), "siblings": siblings, "tags": [], "private": False}
            )
        if what == "tree":
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )
        name = "/".join(rest[2:])
        if name not in files:
            return self._error(404, "EntryNotFound", f"{name} not found")
        data = files[name]
        etag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit_of(files)}
        return self._send(200, data, etag, cut=self.server.cut and name.endswith(".safetensors"))

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut
