"""Pictures and embeddings -> Phi-3-vision's crops; ``<|image_1|>`` -> a run of image tokens.

The formulas are those of the hub repository's image processor (microsoft/Phi-3-vision-128k-instruct,
``image_processing_phi3_v.py``: ``HD_transform``, ``padding_336``, ``preprocess``), reimplemented.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from opsin.api import InputContext, MappedMedia, MediaItem, Placeholder, repeat_token
from opsin.layers import fields, pixel_levels, pixel_values, split_image_embeds
from opsin_models_phi3v.config import CROP, TOKENS, crop_side

Array = np.ndarray[Any, Any]
Grid = tuple[int, int]
"""Rows and columns of crops."""

MAX_CROPS = 64
"""Most that ``num_crops`` may be; the published checkpoints use 4 and 16."""

IMAGE_TOKEN = "<|image|>"


def hd_size(height: int, width: int, num_crops: int) -> tuple[int, int]:
    """The size a landscape picture is resized to: as many crops wide as fit among ``num_crops``.

    Args:
        height: of the picture, in pixels.
        width: the same, not less than the height.
        num_crops: most crops.

    Returns:
        (height, width); the width is a multiple of `CROP`, the height keeps the aspect ratio.

    Raises:
        ValueError: the picture is so elongated that no row of pixels would be left.
    """
    ratio = width / height
    columns = 1
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= num_crops:
        columns += 1
    new_width = columns * CROP
    new_height = int(new_width / ratio)
    if new_height < 1:
        raise ValueError(
            f"a picture whose sides are {width} and {height} is too elongated: with num_crops={num_crops} "
            f"the longer side may be at most {new_width} times the shorter one"
        )
    return new_height, new_width


def hd_transform(pixels: Array, num_crops: int) -> Array:
    """Resize a picture and pad it to whole crops.

    A tall picture is turned on its side first and back afterwards: it is resized and padded as a wide one.

    Args:
        pixels: uint8 (height, width, 3).
        num_crops: most crops.

    Returns:
        uint8 (rows * CROP, columns * CROP, 3), the picture in the middle, white above and below it (left
        and right of a tall one).

    Raises:
        ValueError: the picture is too elongated.
    """
    tall = pixels.shape[1] < pixels.shape[0]
    if tall:
        pixels = np.ascontiguousarray(pixels.swapaxes(0, 1))
    height, width = hd_size(pixels.shape[0], pixels.shape[1], num_crops)
    canvas = np.full((-(-height // CROP) * CROP, width, 3), 255, np.uint8)
    top = (len(canvas) - height) // 2
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    canvas[top : top + height] = np.asarray(resized)
    return canvas.swapaxes(0, 1) if tall else canvas


def num_embeds(grid: Grid, side: int = TOKENS) -> int:
    """Embeddings of a picture: its crops with a newline after each row, a separator, the global view.

    Args:
        grid: of crops.
        side: of a crop, in embeddings.
    """
    rows, columns = grid
    crops = rows * side * (columns * side + 1)
    return crops + 1 + side * (side + 1)


def is_possible(count: int, side: int = TOKENS) -> bool:
    """Whether some grid of crops has this many embeddings."""
    return any(
        num_embeds((rows, columns), side) == count
        for rows in range(1, count // side**2 + 1)
        for columns in [(count - num_embeds((rows, 0), side)) // (rows * side**2)]
        if columns >= 1
    )


class ImageMapper:
    """Pictures as a global view and crops, by the settings of preprocessor_config.json."""

    option_names = frozenset({"num_crops"})
    size_option = "num_crops"

    def __init__(self, context: InputContext) -> None:
        self._side = crop_side(context.config)
        # Every published checkpoint says num_crops; 1 is the default of the hub's class.
        given = fields(context.preprocessor, {"num_crops": 1, "num_img_tokens": self._side**2})
        if given["num_img_tokens"] != self._side**2:
            raise ValueError(
                f"num_img_tokens is {given['num_img_tokens']} in preprocessor_config.json and "
                f"{self._side**2} in config.json"
            )
        self._num_crops = given["num_crops"]
        self._crops_asked({})
        self._levels = pixel_levels(context.preprocessor)

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        """See `opsin.api.InputMapper.map`.

        ``pixel_values`` is float32 (1 + rows * columns, 3, CROP, CROP): the global view, then the crops in
        row-major order. The geometry is the grid (rows, columns); None for embeddings.
        """
        if item.embeds is not None:
            embeds = item.embeds["embeds"]
            return MappedMedia(num_embeds=len(embeds), embeds=embeds)
        assert item.pixels is not None
        values = pixel_values(hd_transform(item.pixels, self._crops_asked(options)), self._levels)
        rows, columns = (side // CROP for side in values.shape[1:])
        # The hub's processor makes the global view of the padded, normalised picture, without antialiasing.
        whole = F.interpolate(values[None], (CROP, CROP), mode="bicubic", align_corners=False)
        crops = values.view(3, rows, CROP, columns, CROP).permute(1, 3, 0, 2, 4).flatten(0, 1)
        return MappedMedia(
            num_embeds=num_embeds((rows, columns), self._side),
            tensors={"pixel_values": torch.cat([whole, crops])},
            geometry=(rows, columns),
        )

    def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
        """See `opsin.api.EmbedCounter`."""
        short, long = sorted((width, height))
        sides = hd_size(short, long, self._crops_asked(options))
        rows, columns = (-(-side // CROP) for side in (sides if width >= height else sides[::-1]))
        return num_embeds((rows, columns), self._side)

    def _crops_asked(self, options: Mapping[str, Any]) -> int:
        count = options.get("num_crops", self._num_crops)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_CROPS:
            raise ValueError(f"num_crops={count!r}: expected an integer from 1 to {MAX_CROPS}")
        return count

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """A tensor (images, E, H), or a list of tensors (E, H): E is what some grid of crops has."""
        items = split_image_embeds(data)
        for item in items:
            if not is_possible(len(item), self._side):
                raise ValueError(
                    f"the embeddings of an image are {tuple(item.shape)}; a picture of this family has "
                    f"(rows * columns + 1) * {self._side**2} + 1 + (rows + 1) * {self._side} embeddings, for "
                    f"1 x 1 crops {num_embeds((1, 1), self._side)}"
                )
        return [{"embeds": item} for item in items]


def image_placeholder(context: InputContext) -> Placeholder:
    """``<|image_1|>``, ``<|image_2|>``, ...: each is text, not one token, and becomes image tokens.

    By default the text between two of them is tokenized on its own with a BOS, as the hub's processor does;
    with ``tokenize_whole_prompt`` the prompt is tokenized as a whole.
    """
    return Placeholder(
        text=lambda number: f"<|image_{number}|>",
        expand=repeat_token(context.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),
        special_tokens_per_chunk=True,
        tokenizes_whole=_tokenizes_whole,
        option_names=frozenset({"tokenize_whole_prompt"}),
    )


def _tokenizes_whole(options: Mapping[str, Any]) -> bool:
    wanted = options.get("tokenize_whole_prompt", False)
    if not isinstance(wanted, bool):
        raise ValueError(f"tokenize_whole_prompt={wanted!r}: expected true or false")
    return wanted
