"""Whatever a user passes as a picture or a video -> `MediaItem`: within limits, decoded, with a digest."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin.api import MediaItem, Modality
from opsin.config import MediaLimits
from opsin.errors import MediaError, require_known
from opsin.inputs.data_url import check_num_bytes, decode_data_url
from opsin.inputs.media_files import (
    Array,
    Times,
    Undecoded,
    open_frames,
    open_image,
    open_pil,
    stack_frames,
)

_FILE = (str, Path, bytes, bytearray, memoryview)


@dataclass(frozen=True, kw_only=True)
class MediaSource:
    """One item, opened: what its header says has been held against the limits, and nothing is decoded yet.

    Attributes:
        size: (width, height, frames) as stored, 1 frame for a picture; None for embeddings.
        decode: gives the item. Raises `MediaError`.
        where: its place, for error messages, where the user has named one.
    """

    size: tuple[int, int, int] | None
    decode: Callable[[], MediaItem]
    where: str = ""


def media_item(
    modality: Modality, value: Any, limits: MediaLimits | None = None, *, local_files: bool = True
) -> MediaItem:
    """Open and decode one item, see `open_media`."""
    return open_media(modality, value, limits, local_files=local_files).decode()


def open_media(
    modality: Modality, value: Any, limits: MediaLimits | None = None, *, local_files: bool = True
) -> MediaSource:
    """One picture, one video, or an item of another modality.

    A file is a path, encoded bytes, or a ``data:`` or ``file://`` URL. A picture is a file, a PIL image of
    any mode, a uint8 array (H, W, 3) or (H, W), or a uint8 tensor (3, H, W) or (H, W, 3). Files and PIL
    images become what a viewer shows; arrays and tensors are taken as they are. A video is

    - frames, all of which are used: a list of pictures, a folder of their files (in natural order of their
      names), a uint8 array (F, H, W, 3), or a uint8 tensor (F, 3, H, W) or (F, H, W, 3);
    - frames and when they are shown: ``(frames, {"fps": 2.0})`` or ``(frames, {"times": [0, 0.5, ...]})``,
      in seconds;
    - a file, sampled to ``limits.sampled_video_frames``: an animated GIF, WebP, PNG or TIFF, or (with PyAV)
      MP4, MOV, WebM, Matroska, AVI.

    Args:
        modality: expected of the item.
        value: a picture or a video as above, or a `MediaItem`.
        limits: caps on sizes, and the background of what is transparent; None: the defaults.
        local_files: whether paths and ``file://`` URLs are read. Off for whatever came over a network.

    Raises:
        MediaError: it is something else, is damaged, has frames of several sizes, or exceeds a limit; or the
            same from `MediaSource.decode`.
    """
    if isinstance(value, MediaItem):
        if value.modality != modality:
            raise MediaError(f"got an item of modality {value.modality} where {modality} was expected")
        size = None if value.pixels is None else (*value.pixels.shape[-2:-4:-1], _num_frames(value.pixels))
        return MediaSource(size=size, decode=lambda: value)
    limits = limits or MediaLimits()
    if modality == "image":
        opened = _picture(value, limits, local_files)
    elif modality == "video":
        opened = _video(value, limits, local_files)
    else:
        raise MediaError(
            f"got a {type(value).__name__}; expected embeddings or a MediaItem of modality {modality}"
        )
    return MediaSource(size=opened[:3], decode=lambda: _item(modality, *opened.decode()))


def is_timed(value: Any) -> bool:
    """Whether it is a pair of a video's frames and when they are shown."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping)


def _item(modality: Modality, pixels: Array, times: Times | None) -> MediaItem:
    # Hashed in place: sha256 reads the array's own memory.
    pixels = np.ascontiguousarray(pixels)
    digest = hashlib.sha256(f"{modality} RGB {pixels.shape}{times or ''}\n".encode())
    digest.update(pixels.data)
    return MediaItem(modality=modality, digest=digest.hexdigest(), pixels=pixels, times=times)


def _num_frames(pixels: Array) -> int:
    return len(pixels) if pixels.ndim == 4 else 1


def embeds_item(modality: Modality, tensors: Mapping[str, Tensor]) -> MediaItem:
    """Ready-made embeddings of one item, as `InputMapper.split_embeds` returned them.

    Raises:
        MediaError: a tensor is sparse or quantised, or holds NaN or infinity, or none is floating point.
    """
    if not any(tensor.is_floating_point() for tensor in tensors.values()):
        raise MediaError(f"got {modality} embeddings without a floating-point tensor; expected one")
    clean: dict[str, Tensor] = {}
    digest = hashlib.sha256(f"{modality} embeds\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise MediaError(f"{modality} embeddings {name!r} must be a dense real tensor")
        tensor = tensor.detach().cpu().contiguous()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise MediaError(f"{modality} embeddings {name!r} hold NaN or infinity")
        clean[name] = tensor
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes: numpy has no bfloat16.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return MediaItem(modality=modality, digest=digest.hexdigest(), embeds=clean)


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Turn a ValueError into a `MediaError` whose message begins with the place."""
    try:
        yield
    except ValueError as error:
        raise MediaError(f"{where}: {error}") from None


def _picture(value: Any, limits: MediaLimits, local_files: bool) -> Undecoded:
    if isinstance(value, _FILE):
        return open_image(_content(value, limits, local_files), limits)
    if isinstance(value, Image.Image):
        return open_pil(value, limits)
    if not isinstance(value, (np.ndarray, Tensor)):
        raise MediaError(
            f"got a {type(value).__name__} as an image; expected a PIL image, a uint8 array, bytes, "
            "a path or a URL"
        )
    pixels = _pixels(value, 3)
    if pixels is None or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        got, advice = f"{value.dtype} {tuple(value.shape)}", _advice(value)
        raise MediaError(
            f"got an image as {got}; expected uint8 (height, width, 3) or (height, width){advice}"
        )
    limits.check_size(pixels.shape[1], pixels.shape[0])
    colour = pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)
    return Undecoded(pixels.shape[1], pixels.shape[0], 1, lambda: (colour, None))


def _video(value: Any, limits: MediaLimits, local_files: bool) -> Undecoded:
    if is_timed(value):
        frames, timing = value
        if isinstance(frames, _FILE) and not _is_folder(frames, local_files):
            raise MediaError(
                f"got {sorted(timing)} for a video file, which has times of its own; leave it out"
            )
        opened = _video(frames, limits, local_files)
        times = _times(timing, opened.num_frames)
        return opened._replace(decode=lambda: (opened.decode()[0], times))
    if _is_folder(value, local_files):
        value = _frame_files(Path(value))
    if isinstance(value, _FILE):
        return open_frames(_content(value, limits, local_files), limits)
    if isinstance(value, (np.ndarray, Tensor)):
        pixels = _pixels(value, 4)
        if pixels is None or pixels.ndim != 4 or pixels.shape[3] != 3:
            got, advice = f"{value.dtype} {tuple(value.shape)}", _advice(value)
            raise MediaError(f"got a video as {got}; expected uint8 (frames, height, width, 3){advice}")
        num_frames, height, width, _ = pixels.shape
        limits.check_num_frames(num_frames)
        limits.check_size(width, height, frames=num_frames)
        return Undecoded(width, height, num_frames, lambda: (pixels, None))
    if not isinstance(value, Sequence):
        raise MediaError(f"got a {type(value).__name__} as a video; expected frames, bytes, a path or a URL")
    limits.check_num_frames(len(value))
    return _listed_frames(value, limits, local_files)


def _listed_frames(values: Sequence[Any], limits: MediaLimits, local_files: bool) -> Undecoded:
    sources = []
    for number, value in enumerate(values, 1):
        with errors_at(f"frame {number}"):
            source = open_media("image", value, limits, local_files=local_files)
            if source.size is None:
                raise MediaError("got embeddings; expected a picture")
        limits.check_size(*source.size[:2], frames=len(values))
        sources.append(source)

    def decode() -> tuple[Array, None]:
        frames = []
        for number, source in enumerate(sources, 1):
            with errors_at(f"frame {number}"):
                pixels = source.decode().pixels
                assert pixels is not None, "its size is known"
            frames.append(pixels)
        return stack_frames(frames), None

    assert sources[0].size is not None
    width, height, _ = sources[0].size
    return Undecoded(width, height, len(values), decode)


def _times(timing: Mapping[str, Any], num_frames: int) -> Times:
    """When frames are shown, as the user says."""
    require_known("a video's timing", timing, ("fps", "times"), MediaError)
    try:
        if "times" in timing:
            times = tuple(map(float, timing["times"]))
        else:
            times = tuple(number / float(timing["fps"]) for number in range(num_frames))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        times = ()
    ascending = all(0 <= a < b for a, b in pairwise(times))
    if len(times) != num_frames or len(timing) != 1 or not ascending or not all(map(isfinite, times)):
        raise MediaError(
            f"got {dict(timing)!r:.80} for {num_frames} frames; expected {{'fps': frames per second}} or "
            "{'times': ascending seconds, one for each frame}"
        )
    return times


def _is_folder(value: Any, local_files: bool) -> bool:
    return local_files and isinstance(value, (str, Path)) and not _scheme(value) and os.path.isdir(value)


def _pixels(value: Any, ndim: int) -> Array | None:
    """uint8 (..., H, W, 3) of an array, or of a tensor that may be (..., 3, H, W); None for another dtype."""
    if isinstance(value, Tensor):
        if value.dtype != torch.uint8:
            return None
        value = value.detach().cpu()
        if value.ndim == ndim and value.shape[-1] != 3 and value.shape[-3] == 3:
            value = value.movedim(-3, -1)
        value = value.numpy()
    return cast(Array, value) if value.dtype == np.uint8 else None


def _advice(value: Any) -> str:
    """What to do with an array that is none of pixels."""
    if str(value.dtype).removeprefix("torch.").startswith(("float", "bfloat")):
        return "; of values from 0 to 1, make (255 * values).round() and convert it to uint8"
    if 4 in value.shape[-3:]:
        return "; for transparency, pass a PIL image"
    return "; convert it, or pass a PIL image"


def _content(
    value: str | Path | bytes | bytearray | memoryview, limits: MediaLimits, local_files: bool
) -> bytes:
    """Encoded bytes of a file, within the limit."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        content = bytes(value)
    elif (scheme := _scheme(value)) == "data":
        return decode_data_url(str(value), limits.max_media_bytes)
    elif scheme in ("http", "https"):
        raise MediaError(
            f"{scheme} URLs are fetched in chats only, and not with fetch_urls=False; download it and pass "
            "the bytes or a data: URL"
        )
    elif scheme not in ("", "file"):
        raise MediaError(f"URLs with {scheme[:20]}:// are not supported; expected data:, http:// or https://")
    elif not local_files:
        raise MediaError("local files are not read here; pass a data: URL")
    else:
        path = url2pathname(urlsplit(str(value)).path) if scheme else value
        try:
            with open(path, "rb") as file:
                content = file.read(limits.max_media_bytes + 1)
        except (OSError, ValueError):
            raise MediaError(f"cannot read the file {str(path)[:100]!r}; expected a path or a URL") from None
    check_num_bytes(len(content), limits.max_media_bytes)
    return content


def _scheme(value: str | Path) -> str:
    """Lower-case scheme of a URL; "" for a path."""
    text = value if isinstance(value, str) else ""
    match = re.match(r"data(?=:)|[a-z][a-z0-9+.-]*(?=://)", text, re.IGNORECASE)
    return match[0].lower() if match else ""


def _frame_files(folder: Path) -> list[Path]:
    """Files of a folder, ``frame_2`` before ``frame_10``."""

    def natural(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]

    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=natural)
