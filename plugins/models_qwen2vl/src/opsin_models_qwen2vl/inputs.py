"""Pictures, videos and embeddings -> Qwen2-VL's tensors; placeholders -> runs of pad tokens.

The formulas are those of the family's image processor (transformers, models/qwen2_vl,
``smart_resize`` and the patch order of ``pixel_values``), reimplemented.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin.api import InputContext, MappedMedia, MediaItem, Modality, Placeholder, repeat_token
from opsin.layers import pixel_levels

Array = np.ndarray[Any, Any]

MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size a picture is resized to: both sides multiples of ``factor``, area within the bounds.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        factor: patch size times merge size.
        min_pixels: least area of the result.
        max_pixels: largest area of the result.

    Returns:
        (height, width).

    Raises:
        ValueError: the sides differ by more than `MAX_ASPECT_RATIO`.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"a picture of {width}x{height} is too elongated: the longer side may be at most "
            f"{MAX_ASPECT_RATIO} times the shorter one"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


@dataclass(frozen=True, kw_only=True)
class Patching:
    """The processor's settings.

    Attributes:
        patch_size, merge_size, temporal_patch_size: in pixels, patches, frames.
        min_pixels, max_pixels: bounds of a resized frame's area.
        levels: float32 (3, 256), the normalised value of each 8-bit level of each channel.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    levels: Array

    @classmethod
    def from_config(cls, settings: Mapping[str, Any]) -> Patching:
        """From preprocessor_config.json; what is absent takes the family's defaults."""
        size = settings.get("size") or {}
        return cls(
            patch_size=settings.get("patch_size", 14),
            merge_size=settings.get("merge_size", 2),
            temporal_patch_size=settings.get("temporal_patch_size", 2),
            min_pixels=settings.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
            max_pixels=settings.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280,
            levels=pixel_levels(settings),
        )

    @property
    def factor(self) -> int:
        """Sides of a resized frame are multiples of this, in pixels."""
        return self.patch_size * self.merge_size

    def bounds(self, options: Mapping[str, Any]) -> tuple[int, int]:
        """(min_pixels, max_pixels) after the user's options.

        Raises:
            ValueError: they are not positive integers in order.
        """
        least = options.get("min_pixels", self.min_pixels)
        most = options.get("max_pixels", self.max_pixels)
        if not all(isinstance(value, int) and value > 0 for value in (least, most)) or least > most:
            raise ValueError(
                f"min_pixels={least!r}, max_pixels={most!r}: expected integers, 0 < min_pixels <= max_pixels"
            )
        return least, most

    def grid(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> tuple[int, int, int]:
        """(t, h, w) in patches of frames of this size."""
        height, width = smart_resize(height, width, self.factor, *self.bounds(options))
        return -(-frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size

    def patchify(self, frames: Array, options: Mapping[str, Any]) -> tuple[Tensor, tuple[int, int, int]]:
        """uint8 (F, height, width, 3) -> rows of patches, and their grid.

        Returns:
            pixel values float32 (t * h * w, 3 * temporal_patch_size * patch_size**2), in the order
            (t, h / merge, w / merge, merge, merge); and the grid (t, h, w) in patches.
        """
        num_frames, height, width, _ = frames.shape
        grid = self.grid(width, height, num_frames, options)
        patch, merge = self.patch_size, self.merge_size
        height, width = grid[1] * patch, grid[2] * patch
        resized = np.stack(
            [np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) for f in frames]
        )
        span = self.temporal_patch_size
        if short := -len(resized) % span:
            resized = np.concatenate([resized, resized[-1:].repeat(short, axis=0)])
        split = resized.reshape(
            grid[0], span, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, 3
        ).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        rows = split.reshape(grid[0] * grid[1] * grid[2], 3, span * patch * patch)
        values = np.empty(rows.shape, np.float32)
        for channel in range(3):
            np.take(self.levels[channel], rows[:, channel], out=values[:, channel])
        return torch.from_numpy(values.reshape(len(rows), -1)), grid


class _Mapper:
    """Images and videos: both are frames, cut into patches."""

    option_names = frozenset({"min_pixels", "max_pixels"})
    size_option = "max_pixels"
    modality: Modality

    def __init__(self, context: InputContext) -> None:
        self._patching = Patching.from_config(context.preprocessor)

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        """See `opsin.api.InputMapper.map`; the geometry is the grid (t, h, w) in patches."""
        merged = self._patching.merge_size**2
        if item.embeds is not None:
            grid = tuple(int(n) for n in item.embeds["grid_thw"])
            return MappedMedia(
                num_embeds=math.prod(grid) // merged, embeds=item.embeds["embeds"], geometry=grid
            )
        assert item.pixels is not None
        frames = item.pixels if item.pixels.ndim == 4 else item.pixels[None]
        values, grid = self._patching.patchify(frames, options)
        return MappedMedia(
            num_embeds=math.prod(grid) // merged, tensors={"pixel_values": values}, geometry=grid
        )

    def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
        """See `opsin.api.EmbedCounter`."""
        return math.prod(self._patching.grid(width, height, frames, options)) // self._patching.merge_size**2

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """``{"<modality>_embeds": (total, H), "<modality>_grid_thw": (n, 3)}`` -> n items."""
        names = {f"{self.modality}_embeds", f"{self.modality}_grid_thw"}
        if not isinstance(data, Mapping) or set(data) != names:
            got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(
                f"{self.modality} embeddings of this family are a dict with {' and '.join(sorted(names))}, "
                f"got {got}"
            )
        embeds = torch.as_tensor(data[f"{self.modality}_embeds"])
        grids = torch.as_tensor(data[f"{self.modality}_grid_thw"])
        if embeds.ndim != 2 or grids.ndim != 2 or grids.shape[-1] != 3 or grids.is_floating_point():
            raise ValueError(
                f"{self.modality}_embeds must be (total tokens, hidden) and {self.modality}_grid_thw "
                f"integers (items, 3), got {tuple(embeds.shape)} and {tuple(grids.shape)} {grids.dtype}"
            )
        merge = self._patching.merge_size
        if bool((grids < 1).any()) or bool((grids[:, 1:] % merge).any()):
            raise ValueError(
                f"{self.modality}_grid_thw {grids.tolist()}: expected positive (t, h, w) in patches, "
                f"h and w multiples of {merge}"
            )
        counts = (grids.prod(-1) // merge**2).tolist()
        if sum(counts) != len(embeds):
            raise ValueError(
                f"{self.modality}_grid_thw {grids.tolist()} describes {sum(counts)} embeddings, "
                f"{self.modality}_embeds has {len(embeds)}"
            )
        return [
            {"embeds": part, "grid_thw": grid} for part, grid in zip(embeds.split(counts), grids, strict=True)
        ]


class ImageMapper(_Mapper):
    """Images: one frame, doubled to fill the temporal patch."""

    modality = "image"


class VideoMapper(_Mapper):
    """Videos: frames in pairs; an odd last frame is doubled."""

    modality = "video"


def placeholder(context: InputContext, text: str, config_key: str) -> Placeholder:
    """One pad token in the text becomes one per embedding."""
    token_id = int(context.config.get(config_key) or context.tokenizer.convert_tokens_to_ids(text))
    wrapped = f"<|vision_start|>{text}<|vision_end|>"
    return Placeholder(text=lambda number: wrapped, expand=repeat_token(token_id), token_id=token_id)
