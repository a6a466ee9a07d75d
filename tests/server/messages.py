"""Messages with pictures, as clients write them."""

from __future__ import annotations

import base64
from typing import Any

from tests.server.process import GOLDEN

IMAGES = GOLDEN / "images"
CAT, COFFEE, ROCKET = "cat_150x240.png", "coffee_320x213.png", "rocket_400x80.png"


def data_url(content: bytes | str) -> str:
    """Content, or one of the recorded pictures by name, as a data: URL."""
    data = (IMAGES / content).read_bytes() if isinstance(content, str) else content
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image(url: str) -> dict[str, Any]:
    """A picture by URL."""
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    """Text."""
    return {"type": "text", "text": words}


def user(*parts: Any) -> list[dict[str, Any]]:
    """A conversation of one message: of one text, or of parts."""
    one = len(parts) == 1 and isinstance(parts[0], str)
    return [{"role": "user", "content": parts[0] if one else list(parts)}]
