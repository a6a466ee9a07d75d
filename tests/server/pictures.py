"""Pictures for the tests: good ones, and ones made to hurt."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def picture(size: tuple[int, int] = (64, 48), colour: str = "red", format: str = "PNG") -> bytes:
    """A plain picture, encoded."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format)
    return file.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, compressed: bytes) -> bytes:
    """A greyscale PNG whose header and content need not fit."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", compressed) + _chunk(b"IEND", b"")


def claims_to_be_huge() -> bytes:
    """A few bytes; the header says 30000x30000."""
    return png(30000, 30000, zlib.compress(b"\0" * 100))


def inflates() -> bytes:
    """4x4 pixels in the header; the content unpacks to 256 MiB."""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(256))
    return png(4, 4, packed + packer.flush())


def inflating_text() -> bytes:
    """A good small PNG with a compressed text that unpacks to 64 MiB."""
    good = picture((4, 4))
    end = good.index(b"IDAT") - 4
    text = b"Comment\0\0" + zlib.compress(bytes(64 * 2**20), 1)
    return good[:end] + _chunk(b"zTXt", text) + good[end:]


def gif(frames: int, size: int = 2) -> bytes:
    """An animated GIF of so many frames, each a few bytes."""
    header = b"GIF89a" + struct.pack("<HHBBB", size, size, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    # LZW with a clear code (4) before every pixel (0) and an end code (5): all codes stay 3 bits wide.
    codes = [4, 0] * (size * size) + [5]
    bits = "".join(f"{code:03b}"[::-1] for code in codes)
    packed = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    blocks = [packed[i : i + 255] for i in range(0, len(packed), 255)]
    data = b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    control = b"\x21\xf9\x04\x00\x01\x00\x00\x00"
    image = b"," + struct.pack("<HHHHB", 0, 0, size, size, 0) + b"\x02" + data
    return header + (control + image) * frames + b";"
