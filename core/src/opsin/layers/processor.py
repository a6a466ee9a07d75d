"""Media mapped by transformers' image processor: for a family whose own mapper is yet to be written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from opsin.api import InputContext, MappedMedia, MediaItem
from opsin.layers.embeds import split_image_embeds


class ProcessorMapper:
    """An `opsin.api.InputMapper` around the checkpoint's image processor: slower than your own, and equal.

    Ready-made embeddings are taken in the layouts of `split_image_embeds`, one item for each (E, H). A family
    whose geometry is needed for these, too, overrides `split_embeds` and `map`.

    Args:
        context: of the mapper's builder.
        num_embeds: tensors of one item -> how many embeddings it becomes.
        geometry: tensors of one item -> `MappedMedia.geometry`; None: there is none.
        option_names: ``mm_processor_kwargs`` that are passed to the processor.
        settings: keyword arguments of every call of the processor.

    Raises:
        ValueError: the checkpoint has no image processor that transformers ships.
    """

    def __init__(
        self,
        context: InputContext,
        num_embeds: Callable[[Mapping[str, Tensor]], int],
        *,
        geometry: Callable[[Mapping[str, Tensor]], Any] | None = None,
        option_names: Collection[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.option_names = frozenset(option_names)
        self._num_embeds, self._geometry, self._settings = num_embeds, geometry, settings or {}
        self._processor = context.load_image_processor()

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        """See `opsin.api.InputMapper.map`; the frames of a video go through the processor as pictures do."""
        if item.embeds is not None:
            rows = item.embeds["embeds"]
            return MappedMedia(num_embeds=len(rows), embeds=rows)
        assert item.pixels is not None
        frames = item.pixels if item.pixels.ndim == 4 else item.pixels[None]
        pictures = [Image.fromarray(frame) for frame in frames]
        found = self._processor(images=pictures, return_tensors="pt", **{**self._settings, **options})
        tensors = {name: torch.as_tensor(value) for name, value in found.items()}
        return MappedMedia(
            num_embeds=self._num_embeds(tensors),
            tensors=tensors,
            geometry=None if self._geometry is None else self._geometry(tensors),
        )

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """See `split_image_embeds`."""
        return [{"embeds": rows} for rows in split_image_embeds(data)]
