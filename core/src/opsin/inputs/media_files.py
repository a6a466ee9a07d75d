"""Encoded pictures and videos, and PIL images, as a viewer shows them: uint8 RGB arrays.

What a person sees is what the model sees: pictures and videos are turned as their files say, and what is
transparent is laid on a background, so that colours hidden under it stay hidden.
"""

from __future__ import annotations

import importlib
import io
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from opsin.config import MediaLimits
from opsin.errors import MediaError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is ever handed to a decoder. No EPS or PS: those run an interpreter."""

Array = np.ndarray[Any, Any]
Times = tuple[float, ...]

_LOAD_LOCKS = [threading.Lock() for _ in range(16)]

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> how the stored picture becomes the shown one."""


class Undecoded(NamedTuple):
    """A picture or video whose header has been held against the limits.

    Attributes:
        width, height: in pixels, as stored; it may be shown turned.
        num_frames: frames that are used; 1 for a picture.
        decode: gives uint8 pixels, (height, width, 3) or (frames, height, width, 3), and a video's times.
    """

    width: int
    height: int
    num_frames: int
    decode: Callable[[], tuple[Array, Times | None]]


def open_pil(image: Image.Image, limits: MediaLimits) -> Undecoded:
    """A PIL image of any mode.

    Raises:
        MediaError: too large; from ``decode``: damaged, or its values have no agreed brightness.
    """
    limits.check_size(*image.size)
    return Undecoded(*image.size, 1, lambda: (_shown(image, limits), None))


def open_image(data: bytes, limits: MediaLimits) -> Undecoded:
    """An encoded picture; its first frame, if animated.

    Raises:
        MediaError: as `open_pil`, or not a supported format.
    """
    size = _open_file(data, limits, "image").size
    # Opened again: between the two, only the encoded bytes are held.
    return Undecoded(*size, 1, lambda: (_shown(_open_file(data, limits, "image"), limits), None))


def open_frames(data: bytes, limits: MediaLimits) -> Undecoded:
    """An animated picture or a video file, evenly sampled.

    Videos (MP4, MOV, WebM, Matroska, AVI) need PyAV.

    Raises:
        MediaError: not a supported format, over a limit, damaged, or PyAV is needed and not installed.
    """
    container = _video_container(data)
    if container is not None:
        return _open_video(data, container, limits)
    image = _open_file(data, limits, "video")
    with _decode_errors("video"):
        first = int(image.info.get("default_image", False))
        num_frames = getattr(image, "n_frames", 1) - first
        wanted = [first + index for index in sample_indices(num_frames, limits.sampled_video_frames)]
    limits.check_size(*image.size, frames=len(wanted))
    return Undecoded(*image.size, len(wanted), lambda: _animation(data, wanted, limits))


def stack_frames(frames: Sequence[Array]) -> Array:
    """Frames (height, width, 3) -> (frames, height, width, 3).

    Raises:
        MediaError: they differ in size.
    """
    sizes = {(frame.shape[1], frame.shape[0]) for frame in frames}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sorted(sizes)[:3])
        raise MediaError(f"the frames of a video must have one size, got {listed}; resize them")
    return np.stack(frames)


def sample_indices(num_frames: int, most: int) -> list[int]:
    """At most ``most`` of ``range(num_frames)``, evenly spread, first and last included."""
    count = min(num_frames, most)
    return [round(i * (num_frames - 1) / max(count - 1, 1)) for i in range(count)]


@contextmanager
def _decode_errors(what: str) -> Iterator[None]:
    """Replace a decoder's error by one generic sentence: its own text may hold addresses and paths."""
    try:
        yield
    except (MediaError, MemoryError):
        raise
    except Exception:
        raise MediaError(f"the {what} file is truncated or damaged") from None


# ---- pictures -------------------------------------------------------------------------------------


def _open_file(data: bytes, limits: MediaLimits, what: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:  # PIL's own check of the header
        raise MediaError(
            f"the {what} has too many pixels; at most {limits.max_image_pixels} are accepted"
        ) from None
    except Exception:
        formats = ", ".join(FORMATS) + (", MP4, MOV, WebM, MKV, AVI" if what == "video" else "")
        raise MediaError(f"the {what} cannot be read; expected one of {formats}") from None
    limits.check_size(*image.size)
    return image


def _shown(image: Image.Image, limits: MediaLimits) -> Array:
    """A PIL image as a viewer shows it."""
    # PIL decodes lazily, and not thread-safely; several requests may hold one image.
    with _decode_errors("image"), _LOAD_LOCKS[id(image) // 64 % len(_LOAD_LOCKS)]:
        if image.info.get("default_image") and image.tell() == 0:
            image.seek(1)  # an animated PNG whose still picture is for viewers that do not know animations
        limits.check_size(*image.size)
        key, drawn = _colour_key(image), _drawn(image)
        image.load()
        turn = _turn(image)  # of a PNG, known only now
        shown = _as_8_bits(image, key)
        if drawn != (0, 0, *shown.size):
            part, shown = shown.convert("RGBA").crop(drawn), Image.new("RGBA", shown.size)
            shown.paste(part, drawn[:2])
        if "A" in shown.mode or "a" in shown.mode or "transparency" in shown.info:
            shown = _laid(shown.convert("RGBA"), limits)
        shown = shown.convert("RGB")
        return np.asarray(shown if turn is None else shown.transpose(turn))


def _laid(image: Image.Image, limits: MediaLimits) -> Image.Image:
    """An RGBA image on the background."""
    return Image.alpha_composite(Image.new("RGBA", image.size, limits.background), image)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # viewers pass over broken EXIF data
        return None


def _colour_key(image: Image.Image) -> Any:
    """``info["transparency"]`` on the scale of the decoded values; PIL leaves it as it is in a PNG."""
    key = image.info.get("transparency")
    tile = getattr(image, "tile", None)  # of a file that is not loaded yet
    stored = tile[0][3] if image.format == "PNG" and tile else None
    if isinstance(key, tuple):
        wide = stored == "RGB;16B" or (stored is None and max(key) > 255)
        return tuple(value >> 8 if wide else value & 255 for value in key)
    if isinstance(key, int) and image.mode == "L":
        mask, scale = {"L;2": (3, 85), "L;4": (15, 17)}.get(stored or "", (255, 1))
        return (key & mask) * scale
    return key


def _drawn(image: Image.Image) -> tuple[int, int, int, int]:
    """The box that is drawn on; what a GIF's first frame leaves out is transparent."""
    tile = getattr(image, "tile", None)  # of a file that is not loaded yet
    if image.format == "GIF" and tile and image.tell() == 0:
        left, top, right, bottom = tile[0][1]
        return left, top, right, bottom
    return (0, 0, *image.size)


def _as_8_bits(image: Image.Image, key: Any) -> Image.Image:
    """The image in a mode that PIL converts to RGBA as a viewer would.

    Raises:
        MediaError: what its values mean is not clear.
    """
    # Older versions of Pillow read a 16-bit PNG as "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        tags = getattr(image, "tag_v2", {})
        bits = int(tags.get(ExifTags.Base.BitsPerSample, (16,))[0])
        values = np.asarray(image).astype(np.int32)
        alpha = None if key is None else np.where(values == key, 0, 255).astype(np.uint8)
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
            values = 2**bits - 1 - values
        grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
        if alpha is not None:
            grey.putalpha(Image.fromarray(alpha))
        return grey
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        least, most = float(values.min()), float(values.max())
        if not 0 <= least <= most <= 255 or (image.mode == "F" and 0 < most <= 1):
            raise MediaError(
                f"got a picture of mode {image.mode} with values from {least:g} to {most:g}; expected 0 to "
                '255: scale them, and convert the picture to mode "L"'
            )
        return image.convert("L")
    if image.mode == "La":
        return image.convert("LA")
    if key != image.info.get("transparency"):
        image = image.copy()
        image.info["transparency"] = key
    return image


# ---- videos ---------------------------------------------------------------------------------------


def _animation(data: bytes, wanted: Sequence[int], limits: MediaLimits) -> tuple[Array, Times | None]:
    image = _open_file(data, limits, "video")
    frames, times, clock = [], [], 0.0
    with _decode_errors("video"):
        for index in range(wanted[0], wanted[-1] + 1):
            image.seek(index)
            if index in wanted:
                limits.check_size(*image.size, frames=len(wanted))
                frames.append(_shown(image, limits))
                # WebP says when a frame begins once it is decoded, others how long each one is shown.
                times.append(image.info.get("timestamp", clock) / 1000)
            clock += image.info.get("duration", 0)
    return stack_frames(frames), tuple(times) if clock else None


def _video_container(data: bytes) -> str | None:
    """FFmpeg's name of the container, from its first bytes.

    FFmpeg is always told the container: its own guess may be a playlist, which opens other files and URLs.
    """
    if data[4:8] == b"ftyp":
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    return None


def _open_video(data: bytes, container: str, limits: MediaLimits) -> Undecoded:
    try:
        av: Any = importlib.import_module("av")
    except ImportError:
        raise MediaError(
            "video files need PyAV: pip install av; or pass the frames as a list of images"
        ) from None
    with _decode_errors("video"), av.open(io.BytesIO(data), format=container) as source:
        stream = source.streams.video[0]
        num_packets = sum(1 for packet in source.demux(stream) if packet.size)
        wanted = sample_indices(num_packets, limits.sampled_video_frames)
        width, height = stream.codec_context.width, stream.codec_context.height
        limits.check_size(width, height, frames=len(wanted))

    def decode() -> tuple[Array, Times | None]:
        frames, times = [], []
        with _decode_errors("video"), av.open(io.BytesIO(data), format=container) as source:
            for index, frame in enumerate(_decoded(av, source)):
                if index in wanted:
                    limits.check_size(frame.width, frame.height, frames=len(wanted))
                    frames.append(_shown_frame(frame, limits))
                    times.append(frame.time)
                if index >= wanted[-1]:
                    break
            if None in times:
                return stack_frames(frames), None
            return stack_frames(frames), tuple(time - times[0] for time in times)

    return Undecoded(width, height, len(wanted), decode)


def _decoded(av: Any, source: Any) -> Iterator[Any]:
    """The frames of a video."""
    stream = source.streams.video[0]
    decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if decoder is None or {k.lower(): v for k, v in stream.metadata.items()}.get("alpha_mode") != "1":
        yield from source.decode(stream)
        return
    try:  # FFmpeg's own decoder drops the alpha channel
        codec = av.CodecContext.create(decoder, "r")
    except Exception:
        raise MediaError(
            f"a transparent {stream.codec_context.name} video needs PyAV with {decoder}; "
            "pass its frames as a list of images"
        ) from None
    for packet in source.demux(stream):
        yield from codec.decode(packet)


def _shown_frame(frame: Any, limits: MediaLimits) -> Array:
    """A frame as a player shows it."""
    if any(component.is_alpha for component in frame.format.components):
        laid = _laid(Image.fromarray(frame.to_ndarray(format="rgba")), limits)
        pixels = np.asarray(laid.convert("RGB"))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return pixels if matrix is None else _turned(pixels, bytes(matrix))


def _turned(pixels: Array, matrix: bytes) -> Array:
    """A frame (height, width, 3) turned by a display matrix, in steps of 90 degrees.

    The matrix begins with a, b, u, c, d: a pixel at (x, y) is shown at (ax + cy, bx + dy), see ISO/IEC
    14496-12, 6.2.2.
    """
    across, b, _, c, down = struct.unpack("=5i", matrix[:20])
    if abs(b) + abs(c) > abs(across) + abs(down):
        pixels, across, down = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
