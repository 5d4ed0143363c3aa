"""The page of a run: files that are served as they are, or put together into one that needs no server."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from launcher.http_server import Request, Response, Route

_FOLDER = Path(__file__).with_name("page")
_TYPES = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
_INDEX, _STYLE, _SCRIPTS = "index.html", "page.css", ("plot.js", "heat.js", "page.js")

_NOTHING_ELSE = "default-src 'none'; img-src data:; style-src 'self' 'unsafe-inline'; form-action 'none'"
"""Whatever a name or a line of a log holds, no script but ours runs, and nothing is fetched from elsewhere."""
_POLICY = f"{_NOTHING_ELSE}; script-src 'self'; connect-src 'self'; frame-ancestors 'none'"


def routes() -> dict[str, Route]:
    """Of a server."""
    return {"/": _served(_INDEX), **{f"/{name}": _served(name) for name in (_STYLE, *_SCRIPTS)}}


def _served(name: str) -> Route:
    def answer(request: Request) -> Response:
        content_type = _TYPES[name.rpartition(".")[2]]
        return Response((_FOLDER / name).read_bytes(), content_type, headers={"Content-Security-Policy": _POLICY})

    return answer


def whole(views: Sequence[Mapping[str, Any]]) -> str:
    """One file of HTML that shows the first of these runs, and the others beside it; see `launcher.history.view`."""
    html, style = _text(_INDEX), _text(_STYLE)
    scripts = {name: f"\n{_text(name)}" for name in _SCRIPTS}
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts.values())
    policy = f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_ELSE}; script-src {hashes}">'
    html = html.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{policy}')
    html = html.replace(f'<link rel="stylesheet" href="{_STYLE}">', f"<style>\n{style}</style>")
    for name in _SCRIPTS:
        html = html.replace(f'<script src="{name}" defer></script>\n', "")
    data = f'<script type="application/json" id="runs">{_harmless(views)}</script>'
    body = "\n".join([data, *(f"<script>{script}</script>" for script in scripts.values())])
    return html.replace("</body>", f"{body}\n</body>")


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _harmless(views: Sequence[Mapping[str, Any]]) -> str:
    """As JSON that no browser takes for the end of a script, whatever it holds."""
    text = orjson.dumps(list(views), option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
