"""Pictures and embeddings -> tensors; ``<image>`` -> one token per embedding; positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from opsin.api import Expansion, InputContext, MappedMedia, MediaItem, PlacedMedia, Placeholder, Positions
from opsin.layers import pixel_levels, pixel_values, split_image_embeds


class SquareMapper:
    """Every picture becomes one square."""

    option_names: frozenset[str] = frozenset({"do_convert_rgb"})

    def __init__(self, context: InputContext) -> None:
        vision = context.config["vision_config"]
        self._size: int = vision["image_size"]
        self._num_rows = (self._size // vision["patch_size"]) ** 2 + 1
        self._levels = pixel_levels(context.preprocessor)

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        if item.embeds is not None:
            return MappedMedia(num_embeds=self._num_rows, embeds=item.embeds["embeds"])
        assert item.pixels is not None
        square = np.asarray(Image.fromarray(item.pixels).resize((self._size, self._size)))
        values = pixel_values(square[None], self._levels)
        return MappedMedia(num_embeds=self._num_rows, tensors={"pixel_values": values})

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        return [{"embeds": item} for item in split_image_embeds(data, self._num_rows)]


def placeholder(context: InputContext) -> Placeholder:
    """One image token in the text becomes one per embedding, between two marks."""
    token_id = int(context.config["image_token_id"])
    start, end = (context.tokenizer.convert_tokens_to_ids(token) for token in ("<start>", "<end>"))

    def expand(mapped: MappedMedia, number: int) -> Expansion:
        count = mapped.num_embeds
        return Expansion(
            token_ids=[start, *[token_id] * count, end], is_embed=[False, *[True] * count, False]
        )

    return Placeholder(text=lambda number: "<image>", token_id=token_id, expand=expand)


def positions(config: Mapping[str, Any], token_ids: Sequence[int], media: Sequence[PlacedMedia]) -> Positions:
    """All tokens of a picture share a position on the first of three axes."""
    axes = np.tile(np.arange(len(token_ids), dtype=np.int64), (3, 1))
    for item in media:
        axes[0, item.start : item.end] = item.start
    return Positions(prompt=axes)
