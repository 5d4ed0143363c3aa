"""The page of a run: files that are served as they are, or put into one that needs no server."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.http_server import Request, Response, Route

_FOLDER = Path(__file__).with_name("page")
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:"
"""No script but ours runs, nothing is fetched from elsewhere, whatever a name or a log line holds."""


def routes() -> dict[str, Route]:
    """Of a server."""
    return {path: _served(name, content_type) for path, (name, content_type) in _FILES.items()}


def _served(name: str, content_type: str) -> Route:
    def answer(request: Request) -> Response:
        headers = {"Content-Security-Policy": f"{_POLICY}; frame-ancestors 'none'"}
        return Response((_FOLDER / name).read_bytes(), content_type, headers=headers)

    return answer


def whole(views: Mapping[str, Mapping[str, Any]]) -> str:
    """One file of HTML with all that it shows: of each run, by its name here, what `view_of` tells."""
    html, script, style = (
        (_FOLDER / name).read_text(encoding="utf-8") for name in ("index.html", "page.js", "page.css")
    )
    html = html.replace('<link rel="stylesheet" href="page.css">', f"<style>\n{style}</style>")
    data = f'<script type="application/json" id="runs">{_harmless(json.dumps(views))}</script>'
    return html.replace('<script src="page.js" defer></script>', f"{data}\n<script defer>\n{script}</script>")


def _harmless(text: str) -> str:
    """JSON that no browser takes for the end of a script, whatever it holds."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
