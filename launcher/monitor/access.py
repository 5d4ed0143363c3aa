"""Who may see the page of a run. Pure, but for the token's file.

On the loopback interface every user of the machine may, and no web page of elsewhere: a browser that was led here by a
name of another host says that name. Where the network reaches the page, it takes a bearer token.
"""

import hmac
import os
import secrets
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from launcher.http_server import Request, Response, Route

TOKEN_VARIABLE = "BROADGAUGE_PAGE_TOKEN"
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_TOKEN_BYTES = 24


@dataclass(frozen=True)
class Access:
    token: str | None
    """None on the loopback interface."""

    def guarded(self, route: Route) -> Route:
        """The route, for those who may see what it tells."""

        def answer(request: Request) -> Response:
            return route(request) if self.allows(request) else self._refusal()

        return answer

    def allows(self, request: Request) -> bool:
        if self.token is None:
            return request.headers.get("host", "").rpartition(":")[0] in _LOCAL_NAMES
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode())

    def _refusal(self) -> Response:
        if self.token is None:
            return Response(b"this page is for this machine alone\n", status=HTTPStatus.FORBIDDEN)
        return Response(
            b"a bearer token is needed\n", status=HTTPStatus.UNAUTHORIZED, headers={"WWW-Authenticate": "Bearer"}
        )


def token_of(path: Path) -> str:
    """The token of a run: that of the environment, else the one in its file, which is made where there is none."""
    given = os.environ.get(TOKEN_VARIABLE, "").strip()
    if given:
        return given
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text(encoding="utf-8").strip() or _fresh(path)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(token := secrets.token_urlsafe(_TOKEN_BYTES))
    return token


def _fresh(path: Path) -> str:
    """In the place of a file that was left empty."""
    path.unlink()
    return token_of(path)
