"""Pictures and videos of any size -> rows of patches, for towers that take them in their own shape.

A frame is resized to whole patches within bounds of its area, and cut; ``merge_size`` x ``merge_size``
patches become one embedding. Several frames make one step of time (Wang et al. 2024, section 2.1). The
formulas are those of transformers (``smart_resize``, and the order of ``pixel_values``), reimplemented.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin.api import InputContext, MappedMedia, MediaItem, Modality, Placeholder, repeat_token
from opsin.layers.embeds import split_embeds
from opsin.layers.pixels import CLIP_MEAN, CLIP_STD, Array, pixel_levels, resampling
from opsin.layers.text import fields

logger = logging.getLogger(__name__)

Grid = tuple[int, int, int]
"""Steps of time, rows and columns, in patches."""

MAX_ASPECT_RATIO = 200

_FIELDS: Mapping[str, Any] = {
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": int | None,
    "max_pixels": int | None,
    "do_resize": True,
    "cap_pixels_per_frame": bool | None,
    "max_video_tokens": int | None,
}
"""Defaults of transformers' processors for these towers (5.23)."""


def fit_to_patches(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    *,
    frames: int = 1,
    span: int = 1,
) -> tuple[int, int]:
    """The size a frame is resized to: both sides multiples of ``factor``, area within the bounds.

    Args:
        height: of the frame, in pixels.
        width: of the frame, in pixels.
        factor: patch size times merge size.
        min_pixels: least area of the result.
        max_pixels: largest area of the result.
        frames: of a video whose bounds are meant for all its frames together.
        span: frames in a step of time, to whose multiple ``frames`` are rounded when areas are compared.

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
    area = round(frames / span) * span * new_height * new_width
    if area > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


@dataclass(frozen=True, kw_only=True)
class Patching:
    """A processor's settings.

    Attributes:
        patch_size, merge_size, temporal_patch_size: in pixels, patches, frames.
        min_pixels, max_pixels: bounds of a resized frame's area.
        resample: PIL's filter.
        levels: float32 (3, 256), the normalised value of each 8-bit level of each channel.
        whole_video: whether the bounds are those of all frames of a video together.
        video_tokens: the processor's ``max_video_tokens`` where it caps the area of a frame
            (``cap_pixels_per_frame``): in a whole video, embeddings of one frame; otherwise of all steps,
            nine tenths of which are shared out. None: no cap.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    resample: Image.Resampling
    levels: Array
    whole_video: bool = False
    video_tokens: int | None = None

    @classmethod
    def from_config(
        cls,
        settings: Mapping[str, Any],
        vision: Mapping[str, Any],
        bounds: tuple[int, int],
        *,
        patch_size: int = 14,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        whole_video: bool = False,
    ) -> Patching:
        """From a processor's settings; what is absent takes the family's defaults.

        Args:
            settings: preprocessor_config.json, or that for videos.
            vision: the vision tower's fields of config.json.
            bounds: (min_pixels, max_pixels) where the settings do not say them.
            patch_size: the same.
            mean: the same, of each channel.
            std: the same.
            whole_video: see `Patching`.

        Raises:
            ValueError: a setting cannot be used, or the tower cuts pictures otherwise.
        """
        settings = fields(settings, {**_FIELDS, "patch_size": patch_size})
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
        tokens = settings["max_video_tokens"] or (768 if whole_video else 128_000)
        patching = cls(
            patch_size=settings["patch_size"],
            merge_size=settings["merge_size"],
            temporal_patch_size=settings["temporal_patch_size"],
            resample=resampling(settings),
            levels=pixel_levels(settings, mean=mean, std=std),
            min_pixels=least,
            max_pixels=most,
            whole_video=whole_video,
            video_tokens=tokens if settings["cap_pixels_per_frame"] else None,
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

    def grid(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> Grid:
        """(t, h, w) in patches of frames of this size."""
        span, factor = self.temporal_patch_size, self.factor
        least, most = self.bounds(options)
        steps = -(-frames // span)
        if self.video_tokens is not None:
            floor = int(least * 1.05)
            if self.whole_video:
                most = frames * max(min(self.video_tokens * factor**2, most // frames), floor)
            else:
                most = max(min(most, int(self.video_tokens * factor**2 * 0.9) * span // frames), floor)
        if self.whole_video:
            frames = max(frames, span)  # a frame alone is repeated
            if min(height, width) < factor:
                scale = max(factor / height, factor / width)
                height, width = int(height * scale), int(width * scale)
            height, width = fit_to_patches(height, width, factor, least, most, frames=frames, span=span)
        else:
            height, width = fit_to_patches(height, width, factor, least, most)
        return steps, height // self.patch_size, width // self.patch_size

    def patchify(self, frames: Array, options: Mapping[str, Any]) -> tuple[Tensor, Grid]:
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


class GridMapper:
    """Pictures or videos, both of which are frames cut into patches: an `opsin.api.InputMapper`.

    A family whose model needs to know more of an item than its grid overrides `geometry`, and names what
    embeddings as input may come with in ``timing``.

    Args:
        modality: what it maps.
        patching: how.
    """

    option_names = frozenset({"min_pixels", "max_pixels"})
    size_option = "max_pixels"
    timing: str | None = None
    """Key of an embeddings input, beside the grids: a number or numbers for each item."""

    def __init__(self, modality: Modality, patching: Patching) -> None:
        self.modality, self.patching = modality, patching

    def geometry(
        self,
        item: MediaItem,  # noqa: ARG002 (for families that override it)
        grid: Grid,
        options: Mapping[str, Any],  # noqa: ARG002
    ) -> Any:
        """`MappedMedia.geometry`: here the grid.

        Args:
            item: of embeddings as input, ``item.embeds`` may have ``"timing"``, float64 (n,).
            grid: (t, h, w) in patches.
            options: see `opsin.api.InputMapper.map`.

        Raises:
            ValueError: the item cannot be used.
        """
        return grid

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        """See `opsin.api.InputMapper.map`."""
        tensors: dict[str, Tensor] = {}
        embeds: Tensor | None = None
        if item.embeds is not None:
            steps, rows, columns = (int(n) for n in item.embeds["grid_thw"])
            grid, embeds = (steps, rows, columns), item.embeds["embeds"]
        else:
            assert item.pixels is not None
            frames = item.pixels if item.pixels.ndim == 4 else item.pixels[None]
            tensors["pixel_values"], grid = self.patching.patchify(frames, options)
        return MappedMedia(
            num_embeds=math.prod(grid) // self.patching.merge_size**2,
            tensors=tensors,
            embeds=embeds,
            geometry=self.geometry(item, grid, options),
        )

    def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
        """See `opsin.api.EmbedCounter`."""
        return math.prod(self.patching.grid(width, height, frames, options)) // self.patching.merge_size**2

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """``{"<modality>_embeds": ..., "<modality>_grid_thw": (n, 3)}`` -> n items.

        The layouts of the embeddings are those of `opsin.layers.split_embeds`. There may be ``timing``, too.
        """
        names = {f"{self.modality}_embeds", f"{self.modality}_grid_thw"}
        if not isinstance(data, Mapping) or set(data) - {self.timing} != names:
            got = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(
                f"{self.modality} embeddings of this family are a dict with {' and '.join(sorted(names))}"
                f"{f' (and {self.timing})' if self.timing else ''}, got {got}"
            )
        grids, merge = self._grids(data[f"{self.modality}_grid_thw"]), self.patching.merge_size
        counts = [math.prod(grid) // merge**2 for grid in grids]
        parts = split_embeds(data[f"{self.modality}_embeds"], f"{self.modality}_embeds", counts)
        items = [{"embeds": part, "grid_thw": torch.tensor(grid)} for part, grid in zip(parts, grids)]
        if self.timing in data:
            for item, numbers in zip(items, self._numbers(self.timing, data[self.timing], len(items))):
                item["timing"] = numbers
        return items

    def _numbers(self, name: str | None, given: Any, count: int) -> list[Tensor]:
        """float64 (n,) of each item."""
        try:
            found = [torch.as_tensor(numbers, dtype=torch.float64).flatten() for numbers in given]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} is {given!r:.80}; expected numbers for each {self.modality}") from error
        if len(found) != count:
            raise ValueError(f"{name} is for {len(found)} items; the grids are those of {count}")
        return found

    def _grids(self, given: Any) -> list[Grid]:
        name, merge = f"{self.modality}_grid_thw", self.patching.merge_size
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


class TimedGridMapper(GridMapper):
    """Videos of which a model asks when their frames are shown.

    Args:
        patching: see `GridMapper`.
        fps: of frames of which nobody says it.
    """

    option_names = GridMapper.option_names | {"fps"}

    def __init__(self, patching: Patching, fps: float) -> None:
        super().__init__("video", patching)
        self._fps = fps
        self._warned = False

    def frame_times(self, item: MediaItem, grid: Grid, options: Mapping[str, Any]) -> Sequence[float]:
        """Seconds at which each frame is shown: the item's own, or by the option ``fps``.

        Raises:
            ValueError: ``fps`` is no positive number.
        """
        fps = options.get("fps", self._fps)
        if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
            raise ValueError(f"fps={fps!r}: expected a positive number, the frames per second of a video")
        if item.times is not None:
            return item.times
        if "fps" not in options and not self._warned:
            self._warned = True
            logger.warning(
                "a video came without times: %g frames per second are assumed; say them with the frames, or "
                "as fps in mm_processor_kwargs",
                fps,
            )
        count = grid[0] * self.patching.temporal_patch_size if item.pixels is None else len(item.pixels)
        return [number / fps for number in range(count)]


def step_times(times: Sequence[float], span: int) -> list[float]:
    """Seconds of each step of ``span`` frames, midway from its first to its last frame."""
    padded = [*times, *[times[-1]] * (-len(times) % span)]
    return [(padded[i] + padded[i + span - 1]) / 2 for i in range(0, len(padded), span)]


def step_seconds(times: Sequence[float], span: int) -> float:
    """Seconds from one step of ``span`` frames to the next, on average; 0 for a frame alone."""
    return span * (times[-1] - times[0]) / max(len(times) - 1, 1)


def token_placeholder(context: InputContext, token: str, config_key: str, text: str) -> Placeholder:
    """One token in ``text`` becomes as many as the item has embeddings.

    Args:
        context: its tokenizer says which id ``token`` is, unless config.json does.
        token: such as ``<|image_pad|>``.
        config_key: field of config.json with the id.
        text: what a prompt has for an item.
    """
    given = fields(context.config, {config_key: int | None})[config_key]
    token_id = context.tokenizer.convert_tokens_to_ids(token) if given is None else given
    return Placeholder(text=lambda _number: text, expand=repeat_token(token_id), token_id=token_id)
