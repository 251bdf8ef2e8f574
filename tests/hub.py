"""A small Hub: an HTTP server for repositories in local folders, and caches of the real layout."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits of one model, and the branches and tags that point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)

    def commit(self, folder: Path, *references: str) -> str:
        """Take a folder's files as they are now, as `main` and under other names."""
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        sha = hashlib.sha1(b"".join(n.encode() + files[n] for n in files)).hexdigest()
        self.commits[sha] = files
        self.references |= dict.fromkeys(("main", *references), sha)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.references.get(revision, revision if revision in self.commits else None)


class Hub:
    """What is published, and what has been asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.downloads: list[str] = []

    def publish(self, name: str, folder: Path, *references: str) -> str:
        """Publish a folder as the newest commit of a repository; return the commit."""
        return self.repositories.setdefault(name, Repository()).commit(folder, *references)

    def cached(self, name: str, cache: Path, revision: str = "main") -> Path:
        """Lay a commit into a cache as huggingface_hub does; return the snapshot's folder."""
        repository = self.repositories[name]
        sha = repository.resolve(revision)
        assert sha is not None
        place = cache / f"models--{name.replace('/', '--')}"
        for path, content in repository.commits[sha].items():
            blob = place / "blobs" / _etag(content)
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link = place / "snapshots" / sha / path
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(blob, link.parent))
        if revision != sha:
            reference = place / "refs" / revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(sha)
        return place / "snapshots" / sha

    @contextmanager
    def served(self) -> Iterator[str]:
        """Serve it; yields the address for HF_ENDPOINT."""

        class Handler(_Handler):
            hub = self

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._missing("EntryNotFound")

    def _describe(self, name: str, rest: list[str]) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._missing("RepoNotFound", 401)
        verb = rest[0] if rest else ""
        sha = repository.resolve(rest[1] if len(rest) > 1 else "main")
        if sha is None:
            return self._missing("RevisionNotFound")
        files = repository.commits[sha]
        if verb == "tree":
            under = "/".join(rest[2:])
            listed = [
                {"type": "file", "path": p, "size": len(c), "oid": _etag(c)}
                for p, c in files.items()
                if p.startswith(under)
            ]
            return self._json(listed) if listed else self._missing("EntryNotFound")
        return self._json(
            {"_id": "0", "id": name, "modelId": name, "sha": sha, "private": False, "gated": False,
             "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": p} for p in files]}
        )  # fmt: skip

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._missing("RepoNotFound", 401)
        sha = repository.resolve(revision)
        if sha is None:
            return self._missing("RevisionNotFound")
        content = repository.commits[sha].get(path)
        if content is None:
            return self._missing("EntryNotFound")
        if self.command == "GET":
            self.hub.downloads.append(f"{name}/{path}")
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": sha}
        return self._send(200, content, "application/octet-stream", headers)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), "application/json")

    def _missing(self, code: str, status: int = 404) -> None:
        self._send(status, b"", "text/plain", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(
        self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
