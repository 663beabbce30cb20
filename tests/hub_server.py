"""As much of the hub's HTTP interface, on loopback, as a push uses: repositories of files in memory."""

import base64
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from zlib import crc32

OWNER, TOKEN = "me", "hf_tokenoftests"


@dataclass
class Hub:
    """What was sent."""

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        self.commits.append(lines[0]["value"])
        for line in lines[1:]:
            assert line["key"] == "file", line["key"]
            data = base64.b64decode(line["value"]["content"])
            self.repos[repo][line["value"]["path"]] = data


def is_private(given: dict[str, Any]) -> bool:
    """As it was said before huggingface_hub 2, and since."""
    return bool(given.get("private")) or given.get("visibility") == "private"


@contextmanager
def hub() -> Generator[Hub]:
    """A hub for one user, who has a token."""
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Nothing is logged."""

        def answer(self, code: int, body: object = None, **headers: str) -> None:
            data = b"" if body is None else json.dumps(body).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_HEAD(self) -> None:
            repo, _, file = self.path.strip("/").partition("/resolve/")
            file = file.partition("/")[2]
            data = found.repos.get(repo, {}).get(file)
            if data is not None:
                self.send_response(200)
                given = {"Content-Length": str(len(data)), "X-Repo-Commit": "0" * 40}
                for name, value in {**given, "ETag": f'"{crc32(data)}"'}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)
            else:
                missing = "EntryNotFound" if repo in found.repos else "RepoNotFound"
                self.answer(404, X_Error_Code=missing)

        def do_GET(self) -> None:
            if "/resolve/" in self.path:
                self.do_HEAD()
                return
            repo = self.path.removeprefix("/api/models/").partition("/revision/")[0]
            self.answer(200 if repo in found.repos else 404, {"id": repo, "sha": "0" * 40})

        def do_POST(self) -> None:
            found.asked.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401, {"error": "Invalid username or password."})
                return
            if self.path == "/api/repos/create":
                given = json.loads(body)
                repo = f"{given.get('organization', OWNER)}/{given['name']}"
                known = repo in found.repos
                found.repos.setdefault(repo, {".gitattributes": b""})
                found.private.setdefault(repo, is_private(given))
                url = f"{found.address}/{repo}"
                self.answer(409 if known else 200, {"url": url, "name": repo})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                plain = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer(200, {"files": [{"path": f["path"], **plain} for f in files]})
            elif "/commit/" in self.path:
                repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                found.commit(repo, [json.loads(line) for line in body.splitlines()])
                url = f"{found.address}/{repo}/commit/{'1' * 40}"
                self.answer(200, {"success": True, "commitUrl": url, "commitOid": "1" * 40})
            elif self.path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            else:
                self.answer(404, {"error": self.path})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
