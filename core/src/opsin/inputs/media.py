"""Whatever a user passes as a picture or a video -> `MediaItem`: decoded, within limits, with a digest."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin.api import MediaItem, Modality
from opsin.config import MediaLimits
from opsin.errors import MediaError
from opsin.inputs.data_url import check_num_bytes, decode_data_url
from opsin.inputs.media_files import Array, decode_frames, decode_image, rgb_array, stack_frames

_FILE = (str, Path, bytes, bytearray, memoryview)


def media_item(
    modality: Modality, value: Any, limits: MediaLimits | None = None, *, local_files: bool = True
) -> MediaItem:
    """One picture, one video, or an item of another modality.

    A file is a path, encoded bytes, or a ``data:`` or ``file://`` URL. A picture is a file, a PIL image of
    any mode, a uint8 array (H, W, 3) or (H, W), or a uint8 tensor (3, H, W) or (H, W, 3). A video is

    - frames, all of which are used: a list of pictures, a folder of their files (in natural order of their
      names), a uint8 array (F, H, W, 3), or a uint8 tensor (F, 3, H, W) or (F, H, W, 3);
    - a file, sampled to ``limits.sampled_video_frames``: an animated GIF, WebP, PNG or TIFF, or (with PyAV)
      MP4, MOV, WebM, Matroska, AVI.

    Args:
        modality: expected of the item.
        value: a picture or a video as above, or a `MediaItem`.
        limits: caps on sizes; None: the defaults.
        local_files: whether paths and ``file://`` URLs are read. Off for whatever came over a network.

    Raises:
        MediaError: it is something else, is damaged, has frames of several sizes, or exceeds a limit.
    """
    if isinstance(value, MediaItem):
        if value.modality != modality:
            raise MediaError(f"got an item of modality {value.modality} where {modality} was expected")
        return value
    limits = limits or MediaLimits()
    if modality == "image":
        pixels = _picture(value, limits, local_files)
    elif modality == "video":
        pixels = _video(value, limits, local_files)
    else:
        raise MediaError(
            f"got a {type(value).__name__}; expected embeddings or a MediaItem of modality {modality}"
        )
    # Hashed in place: sha256 reads the array's own memory.
    pixels = np.ascontiguousarray(pixels)
    digest = hashlib.sha256(f"{modality} RGB {pixels.shape}\n".encode())
    digest.update(pixels.data)
    return MediaItem(modality=modality, digest=digest.hexdigest(), pixels=pixels)


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


def _picture(value: Any, limits: MediaLimits, local_files: bool) -> Array:
    if isinstance(value, _FILE):
        return decode_image(_content(value, limits, local_files), limits)
    if isinstance(value, Image.Image):
        return rgb_array(value, limits)
    if isinstance(value, Tensor):
        value = _channels_last(value, 3)
    if not isinstance(value, np.ndarray):
        raise MediaError(
            f"got a {type(value).__name__} as an image; expected a PIL image, a uint8 array, bytes, "
            "a path or a URL"
        )
    if value.dtype != np.uint8 or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3)):
        got = f"{value.dtype} {value.shape}"
        raise MediaError(f"got an image as {got}; expected uint8 (height, width, 3) or (height, width)")
    limits.check_size(value.shape[1], value.shape[0])
    return value if value.ndim == 3 else np.repeat(value[:, :, None], 3, axis=2)


def _video(value: Any, limits: MediaLimits, local_files: bool) -> Array:
    if local_files and isinstance(value, (str, Path)) and not _scheme(value) and os.path.isdir(value):
        value = _frame_files(Path(value))
    if isinstance(value, _FILE):
        return decode_frames(_content(value, limits, local_files), limits)
    if isinstance(value, Tensor):
        value = _channels_last(value, 4)
    if isinstance(value, np.ndarray):
        if value.ndim != 4 or value.shape[3] != 3 or value.dtype != np.uint8:
            raise MediaError(
                f"got a video as {value.dtype} {value.shape}; expected uint8 (frames, height, width, 3)"
            )
        limits.check_num_frames(len(value))
        limits.check_size(value.shape[2], value.shape[1], frames=len(value))
        return value
    if not isinstance(value, Sequence):
        raise MediaError(f"got a {type(value).__name__} as a video; expected frames, bytes, a path or a URL")
    limits.check_num_frames(len(value))
    frames: list[Array] = []
    for number, frame in enumerate(value, 1):
        with errors_at(f"frame {number}"):
            pixels = media_item("image", frame, limits, local_files=local_files).pixels
            if pixels is None:
                raise MediaError("got embeddings; expected a picture")
        limits.check_size(pixels.shape[1], pixels.shape[0], frames=len(value))
        frames.append(pixels)
    return stack_frames(frames)


def _channels_last(tensor: Tensor, ndim: int) -> Array:
    """(..., 3, H, W) or (..., H, W, 3) -> (..., H, W, 3); the caller refuses other shapes."""
    tensor = tensor.detach().cpu()
    if tensor.ndim == ndim and tensor.shape[-1] != 3 and tensor.shape[-3] == 3:
        tensor = tensor.movedim(-3, -1)
    return tensor.numpy()


def _content(
    value: str | Path | bytes | bytearray | memoryview, limits: MediaLimits, local_files: bool
) -> bytes:
    """Encoded bytes of a file, within the limit."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        content = bytes(value)
    elif (scheme := _scheme(value)) == "data":
        return decode_data_url(str(value), limits.max_media_bytes)
    elif scheme in ("http", "https"):
        raise MediaError(f"{scheme} URLs are not fetched here; download it and pass the bytes or a data: URL")
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
