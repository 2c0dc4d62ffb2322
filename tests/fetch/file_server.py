"""A server of files that misbehaves as it is told to."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable

QUICK = {"timeout": 5.0, "pause": 0.01, "attempts": 4}  # for download()


# What the server does with a request: it is given the request and the content of the file.
Behaviour = Callable[["Request", bytes], None]


class Request(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files``; ``server.script`` holds what happens to the next requests instead."""

    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        self.server.paths.append(self.path)
        behaviour = self.server.script.pop(0) if self.server.script else serve
        behaviour(self, self.server.files.get(self.path, b""))

    def begin(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.files: dict[str, bytes] = {}
        self.script: list[Behaviour] = []
        self.ranges: list[str | None] = []
        self.paths: list[str] = []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Clients hang up here on purpose."""


def etag(content: bytes) -> str:
    return f'"{hash(content)}"'


def serve(request: Request, content: bytes, *, upto: int | None = None, validator: bool = True) -> None:
    """What a good server does; with ``upto``, the connection ends after so many bytes of the answer."""
    start, status = 0, 200
    headers = {"ETag": etag(content)} if validator else {}
    asked = request.headers.get("Range")
    if asked and request.headers.get("If-Range") == etag(content):
        start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
        headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    request.begin(status, len(content) - start, **headers)
    request.wfile.write(content[start:][:upto])


def truncate(upto: int) -> Behaviour:
    return lambda request, content: serve(request, content, upto=upto)


def stall(upto: int) -> Behaviour:
    def behaviour(request: Request, content: bytes) -> None:
        serve(request, content, upto=upto)
        request.wfile.flush()
        request.server.over.wait(10)

    return behaviour


def status(code: int) -> Behaviour:
    return lambda request, content: request.begin(code, 0)


def redirect(to: str) -> Behaviour:
    return lambda request, content: request.begin(302, 0, Location=to)
