"""The server behind `headstart browse`: this machine's loopback address only, for who started it only.

Everybody who is logged in on this machine can reach 127.0.0.1, so the address that is printed holds a key, drawn anew
each time, which the browser gets as a cookie. A web page of somebody else in the same browser can reach it too, so a
request must name this machine as its host and, where it says so, come from a page that was served here. The browser is
told to ask nobody else for anything.
"""

import secrets
import socket
from collections.abc import Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import RedirectResponse
from nicegui import ui
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from cache_builder.browse import Space
from cache_builder.browse_page import PICTURES, Browsed, Page
from cache_builder.browse_pictures import LARGE, MEDIA, SMALL, Pictures, encoded, opened, scaled
from cache_builder.browse_samples import Samples
from cache_builder.errors import CacheError

HOST = "127.0.0.1"

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' {socket}; frame-ancestors 'none'"
)
"""Content security policy; the page's own library compiles templates in the browser, hence 'unsafe-eval'."""

PATIENCE = 1
"""Seconds that open connections get when the server is stopped."""


class Guarded:
    """An application that answers only requests to loopback, from its own pages, of who knows the key.

    Args:
        app: what answers.
        port: of this server.
        key: what `/?key=…` must say once; afterwards the browser's cookie does.
    """

    def __init__(self, app: ASGIApp, port: int, key: str) -> None:
        self.app, self.key = app, key
        self.cookie = f"headstart-{port}"  # browsers do not tell ports apart
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        policy = POLICY.format(socket=" ".join(f"ws://{host}" for host in sorted(self.hosts)))
        self.headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        asked = HTTPConnection(scope)
        origin = asked.headers.get("origin")
        own = origin is None or origin.removeprefix("http://") in self.hosts
        if asked.headers.get("host") not in self.hosts or not own:
            await self._refuse(
                scope, receive, send, "only for pages of this server, on this machine"
            )
            return
        enters = scope["type"] == "http" and scope["path"] == "/"
        if enters and self._is_key(asked.query_params.get("key", "")):
            enter = RedirectResponse("/", 303)
            enter.set_cookie(self.cookie, self.key, httponly=True, samesite="strict")
            await enter(scope, receive, send)
            return
        if not self._is_key(asked.cookies.get(self.cookie, "")):
            await self._refuse(
                scope, receive, send, "open the address that headstart browse printed"
            )
            return

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self.headers]}
            await send(message)

        await self.app(scope, receive, sent)

    def _is_key(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.key.encode())

    @staticmethod
    async def _refuse(scope: Scope, receive: Receive, send: Send, why: str) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = Response(why, 403)
        await answer(scope, receive, send)


def listening(port: int) -> socket.socket:
    """A socket on loopback that already queues what comes; port 0 is any free one.

    Raises:
        CacheError: the port cannot be had.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise CacheError(
            f"port {port} of {HOST} cannot be had ({error}); choose another, or leave out --port for a free one"
        ) from None
    found.listen(128)
    return found


def serve(
    samples: Samples,
    spaces: Sequence[Space],
    pictures: Pictures,
    k: int,
    place: socket.socket,
    key: str,
) -> None:
    """Answer at `place`, to who knows the key, until stopped by Ctrl-C, which is raised as KeyboardInterrupt."""
    browsed = Browsed(samples, spaces, pictures, k)
    app = FastAPI(openapi_url=None)

    @app.get(PICTURES + "/{pixels}/{image}")
    def picture(pixels: int, image: int) -> Response:
        if pixels not in (SMALL, LARGE) or not 0 <= image < len(samples.ids):
            return Response(status_code=404)
        shown = encoded(scaled(opened(pictures, samples.ids[image]), pixels))
        kept = {"cache-control": "private, max-age=86400, immutable"}
        return Response(shown, media_type=MEDIA, headers=kept)

    @ui.page("/", title="headstart browse")
    def _() -> None:
        Page(browsed)

    ui.run_with(app, dark=None, tailwind=False, show_welcome_message=False, on_air=None)
    guarded = Guarded(app, place.getsockname()[1], key)
    config = uvicorn.Config(
        guarded,
        log_level="warning",
        ws="wsproto",
        timeout_graceful_shutdown=PATIENCE,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[place])
