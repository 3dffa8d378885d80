"""A hub on this machine: the few calls of the Hugging Face hub that reading and pushing need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """What the server holds, and what it was asked.

    Attributes:
        commits: of each model by its name, the commits in order: (sha, files by path).
        asked: "METHOD path" of every request.
        token: that may write; None lets everyone.
        url: of the server.
    """

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.asked: list[str] = []
        self.token: str | None = None
        self.url = ""

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """A commit with these files beside those that were there."""
        before = self.commits.setdefault(name, [])
        whole = (before[-1][1] if before else {}) | files
        sha = hashlib.sha1(repr((name, len(before), sorted(whole))).encode()).hexdigest()
        before.append((sha, whole))
        return sha

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision names."""
        commits = self.commits.get(name, [])
        if revision == "main" and commits:
            return commits[-1]
        return next((each for each in commits if each[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        if self.headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        self._serve(body)

    def _serve(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        words = path.strip("/").split("/")
        token = self.hub.token
        if body and token and self.headers.get("authorization") != f"Bearer {token}":
            return self._json({"error": "Invalid username or password."}, 401)
        if words[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.hub.commits.setdefault(name, [])
            return self._json({"url": f"{self.hub.url}/{name}", "name": name})
        if words == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if words[:2] == ["api", "models"]:
            return self._api("/".join(words[2:4]), words[4:], body)
        if len(words) > 4 and words[2] == "resolve":
            return self._file("/".join(words[:2]), words[3], "/".join(words[4:]))
        self._json({"error": "not found"}, 404)

    def _api(self, name: str, words: list[str], body: bytes) -> None:
        kind, revision = words[0] if words else "revision", words[1] if words[1:] else "main"
        if name not in self.hub.commits:
            return self._json({"error": "none"}, 404, code="RepoNotFound")
        if kind == "preupload":
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._json({"files": modes})
        if kind == "commit":
            lines = [json.loads(line) for line in body.decode().splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            sha = self.hub.add(name, files)
            url = f"{self.hub.url}/{name}/commit/{sha}"
            return self._json({"success": True, "commitUrl": url, "commitOid": sha})
        found = self.hub.at(name, revision)
        if found is None:
            return self._json({"error": "none"}, 404, code="RevisionNotFound")
        sha, files = found
        if kind == "tree":
            return self._json([self._entry(path, content) for path, content in files.items()])
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": name, "modelId": name, "sha": sha, "siblings": siblings})

    def _entry(self, path: str, content: bytes) -> dict[str, object]:
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": oid}

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self.hub.at(name, revision)
        if found is None or path not in found[1]:
            return self._json({"error": "none"}, 404, code="EntryNotFound")
        sha, content = found[0], found[1][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        self._send(content, 200, headers | {"Content-Type": "application/octet-stream"})

    def _json(self, content: object, status: int = 200, code: str = "") -> None:
        headers = {"Content-Type": "application/json"}
        if code:
            headers["X-Error-Code"] = code
        self._send(json.dumps(content).encode(), status, headers)

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a port of this machine, until the end."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_to(monkeypatch, hub: Hub | None, cache) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE say, which huggingface_hub reads when it is imported."""
    from huggingface_hub import constants

    url = "http://127.0.0.1:9" if hub is None else hub.url  # 9: nothing answers
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "")
