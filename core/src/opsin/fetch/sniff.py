"""What encoded media are, by their first bytes. Names and Content-Type headers are ignored."""

from __future__ import annotations

from opsin.api import Modality

SNIFFED_BYTES = 16
"""Number of bytes that `modality_of` looks at."""


def modality_of(head: bytes) -> Modality | None:
    """``"image"`` for what decodes as a picture, ``"video"`` for video containers, None for all else.

    An animated picture is an image; it may be used as a video too.

    Args:
        head: at least the first `SNIFFED_BYTES`, or all there is.
    """
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM")):
        return "image"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):  # TIFF, BigTIFF
        return "image"
    if head.startswith(b"RIFF"):
        return {b"WEBP": "image", b"AVI ": "video"}.get(head[8:12])
    if head[4:8] == b"ftyp" or head.startswith(b"\x1a\x45\xdf\xa3"):  # MP4 and MOV; Matroska and WebM
        return "video"
    return None
