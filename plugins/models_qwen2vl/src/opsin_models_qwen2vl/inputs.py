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
from opsin.layers import fields, pixel_levels, resampling, split_embeds
from opsin_models_qwen2vl.config import read_config

Array = np.ndarray[Any, Any]

MAX_ASPECT_RATIO = 200

PROCESSOR: Mapping[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": int | None,
    "max_pixels": int | None,
    "do_resize": True,
}
"""Source: Qwen2VLImageProcessor and Qwen2VLVideoProcessor of transformers 5.23."""


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
        resample: PIL's filter.
        levels: float32 (3, 256), the normalised value of each 8-bit level of each channel.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    resample: Image.Resampling
    levels: Array

    @classmethod
    def from_config(
        cls, settings: Mapping[str, Any], vision: Mapping[str, Any], bounds: tuple[int, int]
    ) -> Patching:
        """From a processor's settings; what is absent takes the family's defaults.

        Args:
            settings: preprocessor_config.json, or that for videos.
            vision: the vision tower's fields of config.json.
            bounds: (min_pixels, max_pixels) where the settings do not say them.

        Raises:
            ValueError: a setting cannot be used, or the tower cuts pictures otherwise.
        """
        settings = fields(settings, PROCESSOR)
        # transformers 5 writes the bounds as a size whose "edges" are areas.
        size = fields(settings, {"shortest_edge": int | None, "longest_edge": int | None}, "size")
        least, most = (
            next(value for value in (settings[name], size[edge], default) if value is not None)
            for name, edge, default in zip(
                ("min_pixels", "max_pixels"), ("shortest_edge", "longest_edge"), bounds
            )
        )
        for name, of_tower in (
            ("patch_size", "patch_size"),
            ("merge_size", "spatial_merge_size"),
            ("temporal_patch_size", "temporal_patch_size"),
        ):
            if settings[name] != vision[of_tower]:
                raise ValueError(
                    f"{name} of the processor is {settings[name]}, vision_config.{of_tower} "
                    f"{vision[of_tower]}; expected the same"
                )
        if not settings["do_resize"]:
            raise ValueError(
                "do_resize of the processor is false; pictures are always resized to whole patches"
            )
        patching = cls(
            patch_size=settings["patch_size"],
            merge_size=settings["merge_size"],
            temporal_patch_size=settings["temporal_patch_size"],
            resample=resampling(settings),
            levels=pixel_levels(settings),
            min_pixels=least,
            max_pixels=most,
        )
        patching.bounds({})
        return patching

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
            [np.asarray(Image.fromarray(f).resize((width, height), self.resample)) for f in frames]
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
    bounds: tuple[int, int]

    def __init__(self, context: InputContext) -> None:
        settings = context.preprocessor
        if self.modality == "video":
            settings = context.video_preprocessor or settings
        _, vision = read_config(context.config)
        self._patching = Patching.from_config(settings, vision, self.bounds)

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
        """``{"<modality>_embeds": ..., "<modality>_grid_thw": (n, 3)}`` -> n items.

        The layouts of the embeddings are those of `opsin.layers.split_embeds`.
        """
        names = {f"{self.modality}_embeds", f"{self.modality}_grid_thw"}
        if not isinstance(data, Mapping) or set(data) != names:
            got = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(
                f"{self.modality} embeddings of this family are a dict with {' and '.join(sorted(names))}, "
                f"got {got}"
            )
        grids, merge = self._grids(data[f"{self.modality}_grid_thw"]), self._patching.merge_size
        counts = [math.prod(grid) // merge**2 for grid in grids]
        parts = split_embeds(data[f"{self.modality}_embeds"], f"{self.modality}_embeds", counts)
        return [{"embeds": part, "grid_thw": torch.tensor(grid)} for part, grid in zip(parts, grids)]

    def _grids(self, given: Any) -> list[tuple[int, int, int]]:
        name, merge = f"{self.modality}_grid_thw", self._patching.merge_size
        try:
            grids = np.asarray(given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is a {type(given).__name__}; expected integers (items, 3)") from error
        grids = grids.reshape(1, 3) if grids.shape == (3,) else grids
        if grids.ndim != 2 or grids.shape[1] != 3 or grids.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers (items, 3), got {grids.shape} {grids.dtype}")
        if bool((grids < 1).any()) or bool((grids[:, 1:] % merge).any()):
            raise ValueError(
                f"{name} {grids.tolist()}: expected positive (t, h, w) in patches, h and w multiples of "
                f"{merge}"
            )
        return [(int(t), int(h), int(w)) for t, h, w in grids]


class ImageMapper(_Mapper):
    """Images: one frame, doubled to fill the temporal patch."""

    modality, bounds = "image", (56 * 56, 28 * 28 * 1280)


class VideoMapper(_Mapper):
    """Videos: frames in pairs; an odd last frame is doubled."""

    modality, bounds = "video", (128 * 28 * 28, 28 * 28 * 768)


def placeholder(context: InputContext, text: str, config_key: str) -> Placeholder:
    """One pad token in the text becomes one per embedding."""
    given = fields(context.config, {config_key: int | None})[config_key]
    token_id = context.tokenizer.convert_tokens_to_ids(text) if given is None else given
    wrapped = f"<|vision_start|>{text}<|vision_end|>"
    return Placeholder(text=lambda number: wrapped, expand=repeat_token(token_id), token_id=token_id)
