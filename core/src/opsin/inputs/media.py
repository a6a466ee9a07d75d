"""Whatever a user passes as a picture or a video -> `MediaItem`: decoded, within limits, with a digest."""

from __future__ import annotations

import hashlib
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


def media_item(
    modality: Modality, value: Any, limits: MediaLimits | None = None, *, local_files: bool = True
) -> MediaItem:
    """One item of any modality; for pictures and videos see `image_item` and `video_item`.

    Raises:
        MediaError: it cannot be used.
    """
    if modality == "image":
        return image_item(value, limits, local_files=local_files)
    if modality == "video":
        return video_item(value, limits, local_files=local_files)
    if isinstance(value, MediaItem):
        return _same_modality(value, modality)
    raise MediaError(
        f"got a {type(value).__name__}; expected embeddings or a MediaItem of modality {modality}"
    )


def image_item(value: Any, limits: MediaLimits | None = None, *, local_files: bool = True) -> MediaItem:
    """One picture.

    Args:
        value: a PIL image of any mode; uint8 array (H, W, 3) or (H, W); uint8 tensor (3, H, W) or
            (H, W, 3); a path; encoded bytes; a ``data:``, ``file://`` or http(s) URL; or a `MediaItem`.
        limits: caps on sizes; None: the defaults.
        local_files: whether paths and ``file://`` URLs are read. Off for whatever came over a network.

    Raises:
        MediaError: it is not a picture, is damaged, or exceeds a limit.
    """
    limits = limits or MediaLimits()
    if isinstance(value, MediaItem):
        return _same_modality(value, "image")
    if isinstance(value, (str, Path, bytes, bytearray, memoryview)):
        pixels = decode_image(_content(value, limits, local_files), limits)
    else:
        pixels = _picture(value, limits)
    return _pixels_item("image", pixels)


def video_item(value: Any, limits: MediaLimits | None = None, *, local_files: bool = True) -> MediaItem:
    """One video.

    Args:
        value: frames as a list of whatever `image_item` takes, uint8 array (F, H, W, 3), or uint8 tensor
            (F, 3, H, W) or (F, H, W, 3): all of them are used. Or a folder of frame files (in natural
            order of their names). Or a file as a path, encoded bytes or a URL: an animated GIF, WebP, PNG
            or TIFF, or (with PyAV) MP4, MOV, WebM, Matroska, AVI, sampled to ``limits.sampled_video_frames``.
            Or a `MediaItem`.
        limits, local_files: as for `image_item`.

    Raises:
        MediaError: it is not a video, is damaged, has frames of several sizes, or exceeds a limit.
    """
    limits = limits or MediaLimits()
    if isinstance(value, MediaItem):
        return _same_modality(value, "video")
    if isinstance(value, (str, Path)) and local_files and _is_folder(value):
        value = _frame_files(Path(value))
    if isinstance(value, (str, Path, bytes, bytearray, memoryview)):
        return _pixels_item("video", decode_frames(_content(value, limits, local_files), limits))
    if isinstance(value, (np.ndarray, Tensor)):
        pixels = _channels_last(value, 4).numpy() if isinstance(value, Tensor) else value
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
            raise MediaError(
                f"got a video as {_described(pixels)}; expected uint8 (frames, height, width, 3)"
            )
        limits.check_num_frames(len(pixels))
        limits.check_size(pixels.shape[2], pixels.shape[1], frames=len(pixels))
        return _pixels_item("video", pixels)
    if not isinstance(value, Sequence):
        raise MediaError(f"got a {type(value).__name__} as a video; expected frames, bytes, a path or a URL")
    limits.check_num_frames(len(value))
    frames: list[Array] = []
    for number, frame in enumerate(value, 1):
        with errors_at(f"frame {number}"):
            decoded = image_item(frame, limits, local_files=local_files).pixels
            if decoded is None:
                raise MediaError("got embeddings; expected a picture")
        limits.check_size(decoded.shape[1], decoded.shape[0], frames=len(value))
        frames.append(decoded)
    return _pixels_item("video", stack_frames(frames))


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


def _same_modality(item: MediaItem, modality: Modality) -> MediaItem:
    if item.modality != modality:
        raise MediaError(f"got an item of modality {item.modality} where {modality} was expected")
    return item


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Make a `MediaError` of what goes wrong inside, its message beginning with the place."""
    try:
        yield
    except ValueError as error:
        raise MediaError(f"{where}: {error}") from None


def _pixels_item(modality: Modality, pixels: Array) -> MediaItem:
    # Hashed in place: sha256 reads the array's own memory.
    pixels = np.ascontiguousarray(pixels)
    digest = hashlib.sha256(f"{modality} RGB {pixels.shape}\n".encode())
    digest.update(pixels.data)
    return MediaItem(modality=modality, digest=digest.hexdigest(), pixels=pixels)


def _picture(value: Any, limits: MediaLimits) -> Array:
    if isinstance(value, Image.Image):
        return rgb_array(value, limits)
    if isinstance(value, Tensor):
        value = _channels_last(value, 3).numpy()
    if not isinstance(value, np.ndarray):
        raise MediaError(
            f"got a {type(value).__name__} as an image; expected a PIL image, a uint8 array, bytes, "
            "a path or a URL"
        )
    if value.dtype != np.uint8 or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3)):
        raise MediaError(
            f"got an image as {_described(value)}; expected uint8 (height, width, 3) or (height, width)"
        )
    limits.check_size(value.shape[1], value.shape[0])
    return value if value.ndim == 3 else np.repeat(value[:, :, None], 3, axis=2)


def _channels_last(tensor: Tensor, ndim: int) -> Tensor:
    """(..., 3, H, W) or (..., H, W, 3) -> (..., H, W, 3) on the host; the caller refuses other shapes."""
    tensor = tensor.detach().cpu()
    if tensor.ndim == ndim and tensor.shape[-1] != 3 and tensor.shape[-3] == 3:
        return tensor.movedim(-3, -1)
    return tensor


def _described(value: Array) -> str:
    return f"{value.dtype} {tuple(value.shape)}"


def _content(
    value: str | Path | bytes | bytearray | memoryview,
    limits: MediaLimits,
    local_files: bool,
) -> bytes:
    """Encoded bytes of a path, a URL, or bytes."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    scheme = _scheme(value)
    if scheme == "data":
        return decode_data_url(str(value), limits.max_media_bytes)
    if local_files and scheme in ("", "file"):
        path = Path(url2pathname(urlsplit(str(value)).path)) if scheme else Path(value)
        return _read_file(path, limits)
    if scheme in ("http", "https"):
        raise MediaError(f"{scheme} URLs are not fetched here; download it and pass the bytes or a data: URL")
    if scheme in ("", "file"):
        raise MediaError("local files are not read here; pass a data: URL")
    raise MediaError(f"URLs with {scheme[:20]}:// are not supported; expected data:, http:// or https://")


def _scheme(value: str | Path) -> str:
    """Lower-case scheme of a URL; "" for a path."""
    match = (
        re.match(r"(data):|([a-z][a-z0-9+.-]*)://", value, re.IGNORECASE) if isinstance(value, str) else None
    )
    return (match[1] or match[2]).lower() if match else ""


def _read_file(path: Path, limits: MediaLimits) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limits.max_media_bytes + 1)
    except (OSError, ValueError):
        raise MediaError(
            f"cannot read the file {_shortened(str(path))!r}; expected a path or a URL"
        ) from None
    check_num_bytes(len(content), limits.max_media_bytes)
    return content


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."


def _is_folder(value: str | Path) -> bool:
    try:
        return not _scheme(value) and Path(value).is_dir()
    except (OSError, ValueError):
        return False


def _frame_files(folder: Path) -> list[Path]:
    """Files of a folder, ``frame_2`` before ``frame_10``."""

    def natural(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]

    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=natural)
