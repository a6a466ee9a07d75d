"""The playground page at ``/``: static files, and headers that restrict what they may do."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

CONTENT_TYPES = {
    "index.html": "text/html; charset=utf-8",
    **dict.fromkeys(
        ("app.js", "attachments.js", "chat.js", "markdown.js", "server.js", "store.js", "vendor/marked.js"),
        "text/javascript; charset=utf-8",
    ),
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

UI_PATHS = frozenset({"/", *(f"/ui/{name}" for name in CONTENT_TYPES if name != "index.html")})
"""Paths served without an API key: the page asks for the key and sends it with every question."""

HEADERS = {
    # No inline script or style, nothing from elsewhere, no frame around it, no text made markup.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def mount_ui(app: FastAPI) -> None:
    """Serve the page at ``/`` and its files under ``/ui/``. All its URLs are relative."""
    for name, content_type in CONTENT_TYPES.items():
        path = "/" if name == "index.html" else f"/ui/{name}"
        app.add_api_route(path, _answer(name, content_type), methods=["GET"], include_in_schema=False)


def _answer(name: str, content_type: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    content = files(__package__).joinpath(name).read_bytes()

    async def answer() -> Response:
        return Response(content, media_type=content_type, headers=HEADERS)

    return answer
