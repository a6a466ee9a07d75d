"""Pictures, videos and embeddings -> tiles of pixels; placeholders -> image tokens between marks.

The arithmetic is that of transformers' PIL image processor (models/got_ocr2) with the settings that
InternVL's processor gives it, reimplemented. A frame of a video is one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from opsin.api import InputContext, MappedMedia, MediaItem, Placeholder, expand_by_text
from opsin.layers import (
    cut_tiles,
    fields,
    grid_by_aspect_ratio,
    pixel_levels,
    pixel_values,
    resampling,
    resized,
    split_image_embeds,
)
from opsin_models_internvl.config import TOP, Vision

Array = np.ndarray[Any, Any]

MAX_TILES = 128
"""Most that ``max_patches`` may be; the published checkpoints use 12."""

PROCESSOR: Mapping[str, Any] = {
    "size": {"height": 384, "width": 384},
    "crop_to_patches": True,
    "min_patches": 1,
    "max_patches": 12,
    "do_sample_frames": False,
    "num_frames": int | None,
}
"""Source: GotOcr2ImageProcessor and InternVLVideoProcessor of transformers 5.23. What the settings have as
``crop_to_patches`` decides nothing: InternVL's processor always says that pictures are cut."""


class _Tiles:
    """Settings of a processor, and embeddings as input."""

    def __init__(self, context: InputContext, settings: Mapping[str, Any]) -> None:
        vision = Vision.from_config(context.config)
        self.side, self.num_embeds = vision.image_size, vision.num_embeds
        self.settings = fields(settings, PROCESSOR)
        size = self.settings["size"]
        if (size.get("height"), size.get("width")) != (self.side, self.side):
            raise ValueError(
                f"size is {size}; expected height and width {self.side}, the side of the tower's tiles: "
                "config.json and the processor's settings are not of one checkpoint"
            )
        said = context.read_json("processor_config.json").get("image_seq_length")
        if said not in (None, self.num_embeds):
            raise ValueError(
                f"image_seq_length is {said} in processor_config.json; a tile of {self.side} pixels has "
                f"{self.num_embeds} embeddings by config.json"
            )
        self.levels = pixel_levels(settings)
        self.resample = resampling(settings)

    def mapped(self, tiles: Array) -> MappedMedia:
        """uint8 (tiles, side, side, 3) -> pixel_values, float32 (tiles, 3, side, side).

        The geometry is the number of tiles.
        """
        return MappedMedia(
            num_embeds=len(tiles) * self.num_embeds,
            tensors={"pixel_values": pixel_values(tiles, self.levels)},
            geometry=len(tiles),
        )

    def given(self, embeds: Tensor) -> MappedMedia:
        """Embeddings as input."""
        return MappedMedia(num_embeds=len(embeds), embeds=embeds, geometry=len(embeds) // self.num_embeds)

    def split_embeds(self, data: Any, modality: str) -> Sequence[Mapping[str, Tensor]]:
        """See `opsin.layers.split_image_embeds`; E is a multiple of a tile's."""
        if isinstance(data, Mapping) and set(data) == {f"{modality}_embeds"}:
            data = data[f"{modality}_embeds"]
        parts = split_image_embeds(data)
        if wrong := [len(part) for part in parts if len(part) % self.num_embeds]:
            raise ValueError(
                f"{modality} embeddings have {wrong[0]} rows; expected a multiple of {self.num_embeds}, "
                "those of one tile"
            )
        return [{"embeds": part} for part in parts]


class ImageMapper:
    """A picture as a grid of tiles and, behind them, the whole as one tile."""

    option_names = frozenset({"crop_to_patches", "min_patches", "max_patches"})
    size_option = "max_patches"

    def __init__(self, context: InputContext) -> None:
        self._tiles = _Tiles(context, context.preprocessor)
        self._grid(1, 1, {})

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        """See `opsin.api.InputMapper.map` and `_Tiles.mapped`; the grid row by row, then the whole."""
        if item.embeds is not None:
            return self._tiles.given(item.embeds["embeds"])
        assert item.pixels is not None
        side, resample = self._tiles.side, self._tiles.resample
        rows, columns = self._grid(item.pixels.shape[0], item.pixels.shape[1], options)
        grid = resized(item.pixels, (rows * side, columns * side), resample)
        tiles = cut_tiles(grid, (side, side))
        if len(tiles) > 1:
            tiles = np.concatenate([tiles, resized(item.pixels, (side, side), resample)[None]])
        return self._tiles.mapped(tiles)

    def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
        """See `opsin.api.EmbedCounter`."""
        rows, columns = self._grid(height, width, options)
        count = rows * columns
        return (count + (count > 1)) * self._tiles.num_embeds

    def _grid(self, height: int, width: int, options: Mapping[str, Any]) -> tuple[int, int]:
        cuts = options.get("crop_to_patches", True)
        if not isinstance(cuts, bool):
            raise ValueError(f"crop_to_patches={cuts!r}: expected true or false")
        least, most = (
            options.get(name, self._tiles.settings[name]) for name in ("min_patches", "max_patches")
        )
        if type(least) is not int or type(most) is not int or not 1 <= least <= most <= MAX_TILES:
            raise ValueError(
                f"min_patches={least!r}, max_patches={most!r}: expected integers, 1 <= min_patches <= "
                f"max_patches <= {MAX_TILES}"
            )
        if not cuts or most == 1:
            return 1, 1
        side = self._tiles.side
        return grid_by_aspect_ratio((height, width), (side, side), least, most)

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """See `_Tiles.split_embeds`."""
        return self._tiles.split_embeds(data, "image")


class VideoMapper:
    """A video as one tile per frame."""

    option_names = frozenset({"num_frames"})
    size_option = "num_frames"

    def __init__(self, context: InputContext) -> None:
        self._tiles = _Tiles(context, context.video_preprocessor)
        self._num_frames: int | None = None
        if self._tiles.settings["do_sample_frames"]:
            self._num_frames = self._tiles.settings["num_frames"]

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        """See `opsin.api.InputMapper.map` and `_Tiles.mapped`."""
        if item.embeds is not None:
            return self._tiles.given(item.embeds["embeds"])
        assert item.pixels is not None
        side = self._tiles.side
        chosen = self._chosen(len(item.pixels), options)
        frames = [resized(item.pixels[index], (side, side), self._tiles.resample) for index in chosen]
        return self._tiles.mapped(np.stack(frames))

    def _chosen(self, frames: int, options: Mapping[str, Any]) -> Sequence[int]:
        """``num_frames`` frames, each from the middle of an equal part of the video; all, where it has fewer.

        Source: transformers, models/internvl, ``InternVLVideoProcessor.sample_frames``.
        """
        wanted = options.get("num_frames", self._num_frames)
        if wanted is not None and (type(wanted) is not int or wanted < 1):
            raise ValueError(f"num_frames={wanted!r}: expected a positive integer")
        if wanted is None or wanted >= frames:
            return range(frames)
        return [int(frames / wanted / 2 + index * (frames / wanted)) for index in range(wanted)]

    def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
        """See `opsin.api.EmbedCounter`."""
        return len(self._chosen(frames, options)) * self._tiles.num_embeds

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """See `_Tiles.split_embeds`."""
        return self._tiles.split_embeds(data, "video")


def _placeholder(
    context: InputContext, text: str, expand_text: Callable[[MappedMedia, int], str]
) -> Placeholder:
    return Placeholder(
        text=lambda number: text,
        expand=expand_by_text(context.tokenizer, expand_text, _embed_token(context)),
        token_id=_single(context, text),
        expand_text=expand_text,
        embed_token_id=_embed_token(context),
    )


def _embed_token(context: InputContext) -> int:
    given = fields(context.config, TOP)["image_token_id"]
    return (
        context.tokenizer.convert_tokens_to_ids(_named(context, "context_image_token"))
        if given is None
        else given
    )


def _single(context: InputContext, text: str) -> int | None:
    """The id of a text that is one token."""
    ids = context.tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def _named(context: InputContext, name: str) -> str:
    """A token that tokenizer_config.json names, as all published ones name it."""
    return str(getattr(context.tokenizer, name, None) or _TOKENS[name])


def _tile_text(context: InputContext) -> Callable[[int], str]:
    """Number of embeddings -> them between their marks."""
    start, context_token, end = (
        _named(context, name) for name in ("start_image_token", "context_image_token", "end_image_token")
    )
    return lambda count: f"{start}{context_token * count}{end}"


def image_placeholder(context: InputContext) -> Placeholder:
    """``<IMG_CONTEXT>``, which becomes all of a picture's embeddings between two marks."""
    written = _tile_text(context)
    return _placeholder(
        context, _named(context, "context_image_token"), lambda mapped, number: written(mapped.num_embeds)
    )


def video_placeholder(context: InputContext) -> Placeholder:
    """``<video>``, which becomes numbered frames, each a picture of one tile."""
    written = _tile_text(context)

    def expand_text(mapped: MappedMedia, _number: int) -> str:
        frames: int = mapped.geometry
        frame = written(mapped.num_embeds // frames)
        return "\n".join(f"Frame{number}: {frame}" for number in range(1, frames + 1))

    return _placeholder(context, _named(context, "video_token"), expand_text)
