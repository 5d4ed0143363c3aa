"""A small HTTP server, in threads of the process that serves: answers GET, each path by one function."""

import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_REQUEST_SECONDS = 10.0  # for a client to say what it wants, or to take what it gets
_POLL_SECONDS = 0.1  # until it sees that it is to end
_SEALED = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Request:
    path: str
    query: str
    headers: Mapping[str, str]
    """By name in lower case."""


@dataclass(frozen=True)
class Response:
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


Route = Callable[[Request], Response]

NOT_FOUND = Response(b"not found\n", status=HTTPStatus.NOT_FOUND)


class HttpServer:
    """Serves from the moment it is made until `close`."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        """`port` may be taken, or zero: then any that is free.

        Raises:
            OSError: it cannot listen there.
        """
        self._server = _bound(host, port, routes)
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.end()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    routes: Mapping[str, Route]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open = set[socket.socket]()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def end(self) -> None:
        """Also for those who have a connection open, and would be answered on it."""
        self.shutdown()
        self.server_close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no event."""


def _bound(host: str, port: int, routes: Mapping[str, Route]) -> _Server:
    class Family(_Server):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    try:
        server = Family((host, port), _Handler)
    except OSError:
        if not port:
            raise
        server = Family((host, 0), _Handler)
    server.routes = routes
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "broadgauge", ""
    timeout = _REQUEST_SECONDS
    server: _Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        route = self.server.routes.get(url.path)
        try:
            response = route(Request(url.path, url.query, headers)) if route is not None else NOT_FOUND
        except Exception as error:  # one question that cannot be answered must not end the others
            body = f"{type(error).__name__}\n".encode()
            response = Response(body, status=HTTPStatus.INTERNAL_SERVER_ERROR)
        self.send_response(response.status)
        facts = {"Content-Type": response.content_type, "Content-Length": str(len(response.body))}
        for name, value in {**_SEALED, **facts, **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_HEAD = do_GET  # noqa: N815 - as its base class wants it

    def log_message(self, format: str, *args: Any) -> None:
        """Not to the terminal of a run."""
