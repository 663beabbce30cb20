"""A real S3 protocol server on loopback (moto), and a proxy before it that fails some requests.

The proxy speaks HTTP/1.1 by itself, so that it can answer 503, or drop the connection before the request reached the
server, or after the server has done it but before the answer came back.
"""

import http.client
import random
import socket
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.server import ThreadedMotoServer

BUCKET = "cache-bucket"

FAULTS = ("busy", "dropped before", "dropped after")


@contextmanager
def s3_server() -> Generator[str]:
    """`host:port` of a server with an empty bucket."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        where = f"127.0.0.1:{port}" if host in ("0.0.0.0", "localhost") else f"{host}:{port}"
        connection = http.client.HTTPConnection(where)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        connection.close()
        yield where
    finally:
        server.stop()


@contextmanager
def strict_about_keys(server: str) -> Generator[None]:
    """While this lasts, the server refuses access keys that it does not know; it knows none."""

    def without_keys(requests: str) -> None:
        connection = http.client.HTTPConnection(server)
        connection.request("POST", "/moto-api/reset-auth", requests)
        assert connection.getresponse().status == 200
        connection.close()

    without_keys("0")
    try:
        yield
    finally:
        without_keys("inf")


@contextmanager
def answering(status: int, body: str) -> Generator[str]:
    """`host:port` of a server that has one answer to everything."""

    class Always(BaseHTTPRequestHandler):
        def answer(self) -> None:
            data = body.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_HEAD = answer

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Always)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Proxy(ThreadingHTTPServer):
    """Fails a share of the requests.

    Attributes:
        share: of the requests that fail.
        faults: what happened how often.
    """

    daemon_threads = True

    def __init__(self, target: str, share: float, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.share = target, share
        self.random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.lock = threading.Lock()

    def fault(self) -> str:
        """What goes wrong with this request; nothing, mostly."""
        with self.lock:
            found = self.random.choice(FAULTS) if self.random.random() < self.share else "none"
            self.faults[found] += 1
            return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    """Hands a request on, or fails it."""

    protocol_version = "HTTP/1.1"
    server: Proxy  # pyright: ignore[reportIncompatibleVariableOverride]

    def answer(self) -> None:
        """Any method."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault()
        if fault == "dropped before":
            self._drop()
            return
        if fault == "busy":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        found = connection.getresponse()
        data = found.read()
        connection.close()
        if fault == "dropped after":
            self._drop()
            return
        self.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in (
                "transfer-encoding",
                "connection",
                "content-length",
                "date",
                "server",
            ):
                self.send_header(name, value)
        head = self.command == "HEAD"
        length = found.getheader("Content-Length", "0") if head else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Silence."""


@contextmanager
def failing(target: str, share: float, seed: int = 0) -> Generator[Proxy]:
    """A proxy before a server."""
    proxy = Proxy(target, share, seed)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
