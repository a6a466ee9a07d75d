"""``data:`` URLs (RFC 2397) to bytes."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes

from opsin.errors import MediaError


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The content of ``data:[<type>][;<parameter>=<value>]*[;base64],<data>``.

    Type and parameters are ignored: the content says what it is. Base64 may be in the URL-safe alphabet,
    percent-encoded, unpadded, and broken over lines.

    Raises:
        MediaError: the URL has no comma, its base64 is not valid, or its content exceeds ``max_bytes``.
    """
    header, comma, body = url.partition(",")
    if not comma:
        raise MediaError("the data: URL has no comma; expected data:<type>;base64,<data>")
    if not header.lower().endswith(";base64"):
        check_num_bytes(len(body) - 2 * body.count("%"), max_bytes)
        return unquote_to_bytes(body)
    encoded = unquote_to_bytes(body) if "%" in body else body.encode("utf-8")
    encoded = encoded.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
    check_num_bytes(len(encoded) * 3 // 4, max_bytes)
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise MediaError("the data: URL says base64 but its data is not valid base64") from None


def check_num_bytes(num_bytes: int, max_bytes: int) -> None:
    """Raise a `MediaError` for encoded media over the limit."""
    if num_bytes > max_bytes:
        raise MediaError(f"the file has {num_bytes} bytes; at most {max_bytes} are accepted")
