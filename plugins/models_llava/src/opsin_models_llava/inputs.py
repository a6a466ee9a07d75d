"""Pictures and embeddings -> LLaVA's tensors; ``<image>`` -> a run of image tokens.

Pixels are those of transformers' PIL image processors (CLIP, SigLIP, LLaVA, LLaVA-NeXT), reimplemented.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from opsin.api import InputContext, MappedMedia, MediaItem, Placeholder, repeat_token
from opsin.layers import fields, pixel_levels, pixel_values, resampling, resized, split_image_embeds
from opsin_models_llava.features import TOP, Features
from opsin_models_llava.grid import Grid, Size, best_resolution, fitted_size, grids_of

Array = np.ndarray[Any, Any]

IMAGE_TEXT = "<image>"
DEFAULT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
MAX_ELONGATION = 64
"""Largest aspect ratio that is resized before the middle is cut out: 1x100000 would become gigabytes."""


def centre(pixels: Array, size: Size) -> Array:
    """The middle of a picture; where it is too small, black is put around it.

    Source of the rounding: transformers, ``image_transforms.center_crop``.
    """
    offsets = [(have - want) // 2 for have, want in zip(pixels.shape, size)]
    cut = pixels[tuple(slice(max(0, at), max(0, at) + want) for at, want in zip(offsets, size))]
    short = [want - have for have, want in zip(cut.shape, size)]
    return np.pad(cut, [*((-(-n // 2), n // 2) for n in short), (0, 0)])


def squared(pixels: Array, colour: Sequence[int]) -> Array:
    """A picture in the middle of a square of a colour."""
    height, width, _ = pixels.shape
    side = max(height, width)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = colour
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas


PROCESSOR: Mapping[str, Any] = {
    "image_processor_type": "",
    "do_resize": True,
    "do_center_crop": bool | None,
    "do_pad": bool | None,
}
"""Source: the image processors of CLIP, SigLIP, LLaVA and LLaVA-NeXT of transformers 5.23."""


def _size(settings: Mapping[str, Any], name: str, default: Mapping[str, int]) -> Mapping[str, int]:
    """A size as {"shortest_edge"} or {"height", "width"}; older files have a number for the former."""
    given = settings.get(name) or default
    size = given if isinstance(given, Mapping) else {"shortest_edge": given}
    sides = {side: value for side, value in size.items() if side in ("shortest_edge", "height", "width")}
    if set(sides) not in ({"shortest_edge"}, {"height", "width"}) or not all(
        type(value) is int and value > 0 for value in sides.values()
    ):
        raise ValueError(f"{name} is {given!r:.80}; expected shortest_edge, or height and width, in pixels")
    return sides


class SquareProcessing:
    """preprocessor_config.json of a CLIP or SigLIP processor: any picture -> the tower's square.

    Raises:
        ValueError: it gives pictures of another size than the tower takes.
    """

    def __init__(self, settings: Mapping[str, Any], image_size: int) -> None:
        given = fields(settings, PROCESSOR)
        siglip = "Siglip" in given["image_processor_type"]
        half = (0.5, 0.5, 0.5)
        self.levels = pixel_levels(settings, **({"mean": half, "std": half} if siglip else {}))
        self.resample = resampling(settings)
        square = {"height": image_size, "width": image_size}
        self._size = _size(settings, "size", square if siglip else {"shortest_edge": image_size})
        if not given["do_resize"]:
            self._size = {}
        self._crop: Size | None = None
        if given["do_center_crop"] if given["do_center_crop"] is not None else not siglip:
            crop = _size(settings, "crop_size", square)
            crop = (
                crop
                if "height" in crop
                else {"height": crop["shortest_edge"], "width": crop["shortest_edge"]}
            )
            self._crop = crop["height"], crop["width"]
        # "do_pad" of LLaVA-NeXT's processor means something else.
        self._background: tuple[int, ...] | None = None
        if given["image_processor_type"].startswith("LlavaImageProcessor") and given["do_pad"]:
            self._background = tuple(int(mean * 255) for mean in settings["image_mean"])
        got = self._crop or (self._size.get("height"), self._size.get("width"))
        if got != (image_size, image_size):
            raise ValueError(
                f"preprocessor_config.json makes pictures of {got[1]}x{got[0]}, the vision tower takes "
                f"{image_size}x{image_size}; they are not of one checkpoint"
            )

    def square(self, pixels: Array) -> Array:
        """uint8 (H, W, 3) -> uint8 (image_size, image_size, 3)."""
        if self._background is not None:
            pixels = squared(pixels, self._background)
        if "shortest_edge" in self._size:
            edge = int(self._size["shortest_edge"])
            short = min(pixels.shape[:2])
            if self._crop is not None and max(pixels.shape[:2]) > MAX_ELONGATION * short:
                pixels = centre(pixels, tuple(min(n, MAX_ELONGATION * short) for n in pixels.shape[:2]))
            height, width, _ = pixels.shape
            long = int(edge * max(height, width) / min(height, width))
            pixels = resized(pixels, (edge, long) if height <= width else (long, edge), self.resample)
        elif self._size:
            pixels = resized(pixels, (self._size["height"], self._size["width"]), self.resample)
        return pixels if self._crop is None else centre(pixels, self._crop)


class SquareMapper:
    """LLaVA-1.5: every picture becomes one square, and as many embeddings as any other."""

    option_names: frozenset[str] = frozenset()
    size_option = None

    def __init__(self, context: InputContext) -> None:
        features = Features.from_config(context.config)
        self._num_rows = features.num_rows
        self._processing = SquareProcessing(context.preprocessor, features.image_size)

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        """See `opsin.api.InputMapper.map`; pixel_values are float32 (1, 3, size, size)."""
        if item.embeds is not None:
            return MappedMedia(num_embeds=self._num_rows, embeds=item.embeds["embeds"])
        assert item.pixels is not None
        square = self._processing.square(item.pixels)
        values = pixel_values(square[None], self._processing.levels)
        return MappedMedia(num_embeds=self._num_rows, tensors={"pixel_values": values})

    def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
        """See `opsin.api.EmbedCounter`."""
        return self._num_rows

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """See `opsin.layers.split_image_embeds`."""
        return [{"embeds": item} for item in split_image_embeds(data, self._num_rows)]


class GridMapper:
    """LLaVA-NeXT: the whole picture as one square, and a grid of crops of it."""

    option_names: frozenset[str] = frozenset()
    size_option = None

    def __init__(self, context: InputContext) -> None:
        features = Features.from_config(context.config)
        self._crop, self._side, self._num_rows = features.image_size, features.side, features.num_rows
        settings = context.preprocessor
        # Of the processor's own steps none changes a crop that has the tower's size.
        processing = SquareProcessing(settings, features.image_size)
        size = _size(settings, "size", {"shortest_edge": self._crop})
        if set(size.values()) != {self._crop}:
            raise ValueError(f"size is {size}, crop_size {self._crop}; expected the same for crops of a grid")
        self._levels, self._resample = processing.levels, processing.resample
        given = [fields(source, TOP)["image_grid_pinpoints"] for source in (settings, context.config)]
        pinpoints = given[0] or given[1] or DEFAULT_PINPOINTS
        if None not in given and given[0] != given[1]:
            raise ValueError(
                f"image_grid_pinpoints are {given[0]} in preprocessor_config.json, {given[1]} in config.json"
            )
        for canvas in pinpoints:
            if len(canvas) != 2 or any(
                type(side) is not int or side < 1 or side % self._crop for side in canvas
            ):
                raise ValueError(
                    f"image_grid_pinpoints has {canvas!r}: expected pairs of multiples of {self._crop}, the "
                    "side of the tower's pictures"
                )
        self._canvases = [(height, width) for height, width in pinpoints]
        self._counts = frozenset(
            self._num_rows + grid.num_rows
            for canvas in self._canvases
            for grid in grids_of(canvas, crop=self._crop, side=self._side)
        )

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        """See `opsin.api.InputMapper.map`.

        The geometry is the `Grid`; pixel_values are float32 (1 + crops, 3, size, size): the whole picture
        first, then the crops row by row.
        """
        if item.embeds is not None:
            embeds = item.embeds["embeds"]
            return MappedMedia(num_embeds=len(embeds), embeds=embeds)
        assert item.pixels is not None
        canvas, grid = self._grid((item.pixels.shape[0], item.pixels.shape[1]))
        squares = np.concatenate([self._whole(item.pixels)[None], self._crops(item.pixels, canvas)])
        return MappedMedia(
            num_embeds=self._num_rows + grid.num_rows,
            tensors={"pixel_values": pixel_values(squares, self._levels)},
            geometry=grid,
        )

    def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
        """See `opsin.api.EmbedCounter`."""
        return self._num_rows + self._grid((height, width))[1].num_rows

    def _grid(self, size: Size) -> tuple[Size, Grid]:
        canvas = best_resolution(size, self._canvases)
        return canvas, Grid.of(size, canvas, crop=self._crop, side=self._side)

    def _whole(self, pixels: Array) -> Array:
        return resized(pixels, (self._crop, self._crop), self._resample)

    def _crops(self, pixels: Array, canvas: Size) -> Array:
        """uint8 (crops, size, size, 3): the picture in the middle of its canvas, black around it."""
        height, width = fitted_size((pixels.shape[0], pixels.shape[1]), canvas)
        top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
        padded = np.zeros((*canvas, 3), np.uint8)
        padded[top : top + height, left : left + width] = resized(pixels, (height, width), self._resample)
        rows, columns = canvas[0] // self._crop, canvas[1] // self._crop
        split = padded.reshape(rows, self._crop, columns, self._crop, 3).swapaxes(1, 2)
        return split.reshape(rows * columns, self._crop, self._crop, 3)

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """See `opsin.layers.split_image_embeds`; E is what some size of picture gives."""
        items = split_image_embeds(data)
        for item in items:
            if len(item) not in self._counts:
                raise ValueError(
                    f"the embeddings of an image have shape {tuple(item.shape)}; no size of picture gives "
                    f"{len(item)} embeddings: {self._num_rows} for the whole and those of a grid"
                )
        return [{"embeds": item} for item in items]


def placeholder(context: InputContext) -> Placeholder:
    """One image token in the text becomes one per embedding."""
    top = fields(context.config, TOP)
    given = {top[name] for name in ("image_token_index", "image_token_id")} - {None}
    if len(given) > 1:
        raise ValueError(f"image_token_index and image_token_id differ: {sorted(given)}")
    token_id = given.pop() if given else context.tokenizer.convert_tokens_to_ids(IMAGE_TEXT)
    return Placeholder(text=lambda number: IMAGE_TEXT, expand=repeat_token(token_id), token_id=token_id)
