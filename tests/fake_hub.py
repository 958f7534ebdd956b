"""A Hugging Face hub for one dataset and one model repository, on the loopback interface."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "a" * 40

Repositories = dict[str, dict[str, bytes]]
"""`datasets/owner/name` or `models/owner/name` -> file name -> content."""


@contextlib.contextmanager
def serve(repositories: Repositories) -> Iterator[str]:
    """The endpoint of a hub with these repositories, available inside the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer(self.rfile.read(int(self.headers.get("content-length", 0))).decode())

        def answer(self, posted: str = "") -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith("api/"):
                self.answer_api(path.removeprefix("api/"), posted)
            else:
                self.answer_file(path if path.startswith("datasets/") else f"models/{path}")

        def answer_api(self, path: str, posted: str) -> None:
            parts = path.split("/")
            files = repositories.get("/".join(parts[:3]))
            action = parts[3] if len(parts) > 3 else "info"
            if files is None:
                self.refuse("RepoNotFound")
            elif action in ("info", "revision"):
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                self.send_json(
                    {
                        "id": "/".join(parts[1:3]),
                        "sha": SHA,
                        "siblings": siblings,
                        "private": False,
                        "gated": False,
                        "disabled": False,
                        "downloads": 0,
                        "likes": 0,
                        "tags": [],
                    }
                )
            elif action == "tree":
                self.send_json(list_folder(files, "/".join(parts[5:]), "recursive=true" in self.path.lower()))
            elif action == "paths-info":
                paths = json.loads(posted)["paths"] if posted.startswith("{") else parse_qs(posted)["paths"]
                self.send_json([entry(name, files[name]) for name in paths if name in files])
            else:
                self.refuse("EntryNotFound")

        def answer_file(self, path: str) -> None:
            repository, _, inside = path.partition("/resolve/")
            files = repositories.get(repository)
            name = inside.partition("/")[2]
            if files is None:
                self.refuse("RepoNotFound")
            elif name not in files:
                self.refuse("EntryNotFound")
            else:
                self.send_file(files[name])

        def send_file(self, content: bytes) -> None:
            status, part = 200, content
            if wanted := self.headers.get("range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last or len(content)), len(content) - 1) + 1
                status, part = 206, content[start:stop]
            headers = {"X-Repo-Commit": SHA, "ETag": f'"{digest(content)}"', "Accept-Ranges": "bytes"}
            if status == 206:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self.send(status, part, headers)

        def send_json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def refuse(self, code: str) -> None:
            self.send(404, b"{}", {"X-Error-Code": code})

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def list_folder(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
    inside = {n: c for n, c in files.items() if not folder or n.startswith(f"{folder}/")}
    depth = folder.count("/") + 1 if folder else 0
    folders = {"/".join(n.split("/")[: depth + 1]) for n in inside if n.count("/") > depth}
    found = [entry(n, c) for n, c in inside.items() if recursive or n.count("/") == depth]
    return found + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]


def entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": digest(content)}


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
