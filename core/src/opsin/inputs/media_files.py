"""Encoded pictures and videos (bytes) to uint8 RGB arrays, within limits that are checked from the header."""

from __future__ import annotations

import importlib
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from opsin.config import MediaLimits
from opsin.errors import MediaError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is ever handed to a decoder. No EPS or PS: those run an interpreter."""

Array = np.ndarray[Any, Any]

_LOAD_LOCKS = [threading.Lock() for _ in range(16)]


def rgb_array(image: Image.Image, limits: MediaLimits) -> Array:
    """A PIL image of any mode -> uint8 (height, width, 3).

    As transformers' and vLLM's processors do it: ``convert("RGB")``, which drops alpha and clips float
    modes; EXIF orientation is not applied. 16-bit greyscale is scaled to 8 bits first, because PIL would clip
    it to an almost white picture.

    Raises:
        MediaError: too large, or its file turns out to be damaged while it is decoded.
    """
    limits.check_size(*image.size)
    with _decode_errors("image"):
        # PIL decodes lazily, and not thread-safely; several requests may hold one image.
        with _LOAD_LOCKS[id(image) // 64 % len(_LOAD_LOCKS)]:
            image.load()
        if image.mode.startswith("I;16"):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


def decode_image(data: bytes, limits: MediaLimits) -> Array:
    """An encoded picture (its first frame, if animated) -> uint8 (height, width, 3).

    Raises:
        MediaError: not a supported format, over a limit, or damaged.
    """
    return rgb_array(_open_image(data, limits, "image"), limits)


def decode_frames(data: bytes, limits: MediaLimits) -> Array:
    """An animated picture or a video file -> uint8 (frames, height, width, 3), evenly sampled.

    Videos (MP4, MOV, WebM, Matroska, AVI) need PyAV.

    Raises:
        MediaError: not a supported format, over a limit, damaged, or PyAV is needed and not installed.
    """
    container = _video_container(data)
    if container is not None:
        return _decode_video(data, container, limits)
    image = _open_image(data, limits, "video")
    frames = []
    with _decode_errors("video"):
        wanted = sample_indices(getattr(image, "n_frames", 1), limits.sampled_video_frames)
        for index in wanted:
            image.seek(index)
            limits.check_size(*image.size, frames=len(wanted))
            frames.append(rgb_array(image, limits))
    return stack_frames(frames)


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


def _open_image(data: bytes, limits: MediaLimits, what: str) -> Image.Image:
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


def _decode_video(data: bytes, container: str, limits: MediaLimits) -> Array:
    try:
        av: Any = importlib.import_module("av")
    except ImportError:
        raise MediaError(
            "video files need PyAV: pip install av; or pass the frames as a list of images"
        ) from None
    with _decode_errors("video"):
        with av.open(io.BytesIO(data), format=container) as source:
            packets = sum(1 for packet in source.demux(source.streams.video[0]) if packet.size)
        wanted = sample_indices(packets, limits.sampled_video_frames)
        frames = []
        with av.open(io.BytesIO(data), format=container) as source:
            codec = source.streams.video[0].codec_context
            limits.check_size(codec.width, codec.height, frames=len(wanted))
            chosen = set(wanted)
            for index, frame in enumerate(source.decode(video=0)):
                if index in chosen:
                    limits.check_size(frame.width, frame.height, frames=len(wanted))
                    frames.append(frame.to_ndarray(format="rgb24"))
                if index >= wanted[-1]:
                    break
        return stack_frames(frames)
