"""Pictures, videos and embeddings -> squares of pixels.

The arithmetic is that of transformers' PIL image processor (models/idefics3, models/smolvlm), reimplemented.
Frames are resized as pictures that are not split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin.api import InputContext, MappedMedia, MediaItem
from opsin.layers import (
    cut_tiles,
    fields,
    grid_by_longest_edge,
    pixel_levels,
    pixel_values,
    resampling,
    resized,
    size_by_longest_edge,
    split_embeds,
    split_image_embeds,
)
from opsin_models_smolvlm.config import Vision
from opsin_models_smolvlm.prompts import DEFAULT_FPS, Clip, Squares
from opsin_models_smolvlm.sampling import Sampling

Array = np.ndarray[Any, Any]

MAX_EDGE = 4096
"""No picture is resized to more than this, whatever the settings say."""

PROCESSOR: Mapping[str, Any] = {
    "do_resize": True,
    "do_image_splitting": True,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
}
"""Source: Idefics3ImageProcessor and SmolVLMImageProcessor of transformers 5.23."""


class _Squares:
    """Settings of a processor: any picture -> squares of one size."""

    def __init__(self, context: InputContext, settings: Mapping[str, Any]) -> None:
        vision = Vision.from_config(context.config)
        given = fields(settings, PROCESSOR)
        self.splits: bool = given["do_image_splitting"]
        self.size = _size("size", given["size"]) if given["do_resize"] else None
        square = _size("max_image_size", given["max_image_size"])
        if not isinstance(square, int):
            raise ValueError(f"max_image_size is {given['max_image_size']}; expected longest_edge, in pixels")
        self.square = square
        self.per_square = vision.num_embeds(square)
        said = context.read_json("processor_config.json").get("image_seq_len")
        if said not in (None, self.per_square):
            raise ValueError(
                f"image_seq_len is {said} in processor_config.json; a square of {square} pixels has "
                f"{self.per_square} embeddings by config.json"
            )
        half = (0.5, 0.5, 0.5)
        self.levels = pixel_levels(settings, mean=half, std=half)
        self.resample = resampling(settings, Image.Resampling.LANCZOS)

    def scaled(self, height: int, width: int, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """(height, width) of the first resizing."""
        if size is None:
            return height, width
        return size_by_longest_edge((height, width), size, MAX_EDGE) if isinstance(size, int) else size

    def grid(self, scaled: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of squares; none for a picture that fills one."""
        grid = grid_by_longest_edge(scaled, self.square)
        return (0, 0) if grid == (1, 1) else grid

    def whole(self, pixels: Array) -> Array:
        """uint8 (H, W, 3) -> uint8 (square, square, 3)."""
        return resized(pixels, (self.square, self.square), self.resample)


def _size(name: str, size: Any) -> int | tuple[int, int]:
    """Pixels of the longest edge, or (height, width)."""
    names = ("longest_edge", "height", "width")
    given = size if isinstance(size, Mapping) else {}
    sides: dict[str, Any] = {key: given[key] for key in names if given.get(key)}
    if set(sides) not in ({"longest_edge"}, {"height", "width"}) or not all(
        type(side) is int and side > 0 for side in sides.values()
    ):
        raise ValueError(f"{name} is {size!r:.80}; expected longest_edge, or height and width, in pixels")
    return int(sides["longest_edge"]) if "longest_edge" in sides else (sides["height"], sides["width"])


class ImageMapper:
    """A picture as a grid of squares and as a whole, or as a whole alone."""

    option_names = frozenset({"do_image_splitting", "size"})
    size_option = "size"

    def __init__(self, context: InputContext) -> None:
        self._squares = _Squares(context, context.preprocessor)

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        """See `opsin.api.InputMapper.map`.

        pixel_values are float32 (squares, 3, side, side): the grid row by row, then the whole. The geometry
        is `Squares`.
        """
        squares = self._squares
        if item.embeds is not None:
            rows, columns = (int(n) for n in item.embeds["grid"])
            geometry = Squares(rows, columns, squares.per_square)
            embeds = item.embeds["embeds"]
            return MappedMedia(num_embeds=len(embeds), embeds=embeds, geometry=geometry)
        assert item.pixels is not None
        scaled, (rows, columns) = self._cut(item.pixels.shape[0], item.pixels.shape[1], options)
        pixels = resized(item.pixels, scaled, squares.resample)
        tiles = np.empty((0, squares.square, squares.square, 3), np.uint8)
        if rows:
            pixels = resized(pixels, (rows * squares.square, columns * squares.square), squares.resample)
            tiles = cut_tiles(pixels, (squares.square, squares.square))
        tiles = np.concatenate([tiles, squares.whole(pixels)[None]])
        return MappedMedia(
            num_embeds=len(tiles) * squares.per_square,
            tensors={"pixel_values": pixel_values(tiles, squares.levels)},
            geometry=Squares(rows, columns, squares.per_square),
        )

    def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
        """See `opsin.api.EmbedCounter`."""
        _, (rows, columns) = self._cut(height, width, options)
        return (rows * columns + 1) * self._squares.per_square

    def _cut(
        self, height: int, width: int, options: Mapping[str, Any]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Size in pixels of the first resizing, and the grid."""
        splits = options.get("do_image_splitting", self._squares.splits)
        if not isinstance(splits, bool):
            raise ValueError(f"do_image_splitting={splits!r}: expected true or false")
        size = _size("size", options["size"]) if "size" in options else self._squares.size
        scaled = self._squares.scaled(height, width, size)
        return scaled, self._squares.grid(scaled) if splits else (0, 0)

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """Embeddings of pictures.

        ``{"image_embeds": ..., "rows": [...], "cols": [...]}``, with as many rows and columns as pictures and
        the layouts of `opsin.layers.split_embeds`; without rows and columns, those of
        `opsin.layers.split_image_embeds`, each of one square.
        """
        per_square = self._squares.per_square
        if not isinstance(data, Mapping) or set(data) == {"image_embeds"}:
            parts = split_image_embeds(data)
            if wrong := [len(part) for part in parts if len(part) != per_square]:
                raise ValueError(
                    f"a picture has {wrong[0]} embeddings; one that is not split has {per_square}. Say how "
                    'others were split: {"image_embeds": ..., "rows": [...], "cols": [...]}'
                )
            return [{"embeds": part, "grid": torch.tensor([0, 0])} for part in parts]
        if set(data) != {"image_embeds", "rows", "cols"}:
            raise ValueError(
                f"image embeddings are a dict with {sorted(map(str, data))}; expected image_embeds, rows and "
                "cols"
            )
        grids = list(zip(_counts("rows", data["rows"]), _counts("cols", data["cols"]), strict=False))
        if len(data["rows"]) != len(data["cols"]):
            raise ValueError(
                f"rows are {data['rows']}, cols {data['cols']}; expected one of each per picture"
            )
        if any((rows == 0) != (columns == 0) for rows, columns in grids):
            raise ValueError(f"rows are {data['rows']}, cols {data['cols']}; expected both 0 or neither")
        counts = [(rows * columns + 1) * per_square for rows, columns in grids]
        parts = split_embeds(data["image_embeds"], "image_embeds", counts)
        return [{"embeds": part, "grid": torch.tensor(grid)} for part, grid in zip(parts, grids)]


def _counts(name: str, given: Any) -> list[int]:
    counts = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(counts, (list, tuple)) or not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError(f"{name} are {given!r:.80}; expected a list of integers, one per picture")
    return list(counts)


class VideoMapper:
    """A video as one square per frame, and the times of the frames."""

    option_names = frozenset({"fps", "num_frames"})
    size_option = "num_frames"

    def __init__(self, context: InputContext) -> None:
        settings = context.video_preprocessor
        sampling = fields(settings, {"video_size": dict | None}, "video_sampling")
        if sampling["video_size"] and not settings.get("size"):
            settings = {**settings, "size": sampling["video_size"]}
        self._squares = _Squares(context, settings)
        self._sampling = Sampling.from_settings(settings)

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        """See `opsin.api.InputMapper.map`.

        pixel_values are float32 (frames, 3, side, side); the geometry is a `Clip`. Of a video whose times are
        known frames are sampled as the settings say; of another one all frames are taken.
        """
        squares = self._squares
        sampling = self._sampling.changed(options)
        if item.embeds is not None:
            embeds = item.embeds["embeds"]
            count = len(embeds) // squares.per_square
            return MappedMedia(num_embeds=len(embeds), embeds=embeds, geometry=self._clip(None, count))
        assert item.pixels is not None
        frames, times = item.pixels, item.times
        chosen = range(len(frames)) if times is None else sampling.chosen(times)
        size = min(squares.size, MAX_EDGE) if isinstance(squares.size, int) else squares.size
        tiles = []
        for index in chosen:
            scaled = squares.scaled(frames.shape[1], frames.shape[2], size)
            pixels = (
                frames[index] if squares.size is None else resized(frames[index], scaled, squares.resample)
            )
            tiles.append(squares.whole(pixels))
        clip = self._clip(times, len(frames))
        clip = Clip(tuple(clip.seconds[index] for index in chosen), clip.duration, clip.per_square)
        return MappedMedia(
            num_embeds=len(tiles) * squares.per_square,
            tensors={"pixel_values": pixel_values(np.stack(tiles), squares.levels)},
            geometry=clip,
        )

    def _clip(self, times: Sequence[float] | None, count: int) -> Clip:
        if times is not None:
            return Clip(tuple(times), Sampling.duration(times), self._squares.per_square)
        seconds = tuple(number / DEFAULT_FPS for number in range(count))
        return Clip(seconds, seconds[-1], self._squares.per_square)

    def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
        """See `opsin.api.EmbedCounter`; a video whose times are not known yet may be sampled to one frame."""
        return (1 if self._sampling.changed(options).samples else frames) * self._squares.per_square

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """Embeddings of videos, (frames * a square's, H) each, in the layouts of `split_image_embeds`."""
        if isinstance(data, Mapping) and set(data) == {"video_embeds"}:
            data = data["video_embeds"]
        parts = split_image_embeds(data)
        per_square = self._squares.per_square
        if wrong := [len(part) for part in parts if len(part) % per_square]:
            raise ValueError(
                f"a video has {wrong[0]} embeddings; expected a multiple of {per_square}, a frame's"
            )
        return [{"embeds": part} for part in parts]
