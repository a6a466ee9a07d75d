"""What input mappers need that cut nothing: ready-made embeddings, and transformers' image processor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from opsin.api import InputContext, MappedMedia, MediaItem


def split_image_embeds(data: Any, num_rows: int | None = None) -> list[Tensor]:
    """(images, E, H), (total, H), a list of either, or these as ``image_embeds`` of a dict -> (E, H) each.

    Args:
        data: the user's input.
        num_rows: E, where it is the same for all pictures; None: a tensor (E, H) is one picture.

    Raises:
        ValueError: another layout.
    """
    if isinstance(data, Mapping) and set(data) == {"image_embeds"}:
        data = data["image_embeds"]
    items: list[Tensor] = []
    for part in _dense(data, "image embeddings"):
        if part.ndim == 2 and num_rows is not None and len(part) % num_rows == 0:
            items += part.split(num_rows)
        else:
            items += part.unbind(0) if part.ndim == 3 else [part]
    for item in items:
        if item.ndim != 2 or item.shape[0] == 0 or num_rows not in (None, item.shape[0]):
            raise ValueError(
                f"the embeddings of an image have shape {tuple(item.shape)}, expected "
                f"({num_rows or 'features'}, hidden)"
            )
    return items


def split_embeds(data: Any, name: str, counts: Sequence[int]) -> list[Tensor]:
    """(total, H), (items, E, H) or a list with a tensor of either per item -> (E, H) of each item.

    Args:
        data: the user's input.
        name: of the input, for messages.
        counts: E of each item, as its grid or size says.

    Raises:
        ValueError: another layout, or other counts.
    """
    given = _dense(data, name)
    if not isinstance(data, (list, tuple)) and given[0].ndim == 3 and len(given[0]) != len(counts):
        raise ValueError(
            f"{name} has shape {tuple(given[0].shape)}, {len(given[0])} items; {len(counts)} are described "
            "beside it"
        )
    parts = [part.flatten(0, -2) if part.ndim == 3 else part for part in given]
    wrong = [tuple(part.shape) for part in parts if part.ndim != 2]
    if wrong:
        raise ValueError(f"{name} has shape {wrong[0]}; expected (embeddings, hidden) or (items, n, hidden)")
    if len({part.shape[-1] for part in parts}) > 1:
        raise ValueError(f"{name} has tensors of different widths: {[tuple(part.shape) for part in parts]}")
    lengths = [len(part) for part in parts]
    if sum(lengths) != sum(counts) or (isinstance(data, (list, tuple)) and lengths != list(counts)):
        raise ValueError(
            f"{name} has {' + '.join(map(str, lengths))} embeddings; the items described beside it have "
            f"{' + '.join(map(str, counts))}"
        )
    return list(torch.cat(parts).split(list(counts)))


def _dense(data: Any, name: str) -> list[Tensor]:
    """One or several tensors or arrays as dense tensors."""
    parts = data if isinstance(data, (list, tuple)) else [data]
    try:
        tensors = [torch.as_tensor(part) for part in parts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: got a {type(data).__name__}; expected a tensor or a list of tensors, (n, hidden) each"
        ) from error
    for tensor in tensors:
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be dense tensors, got {tensor.layout}")
    return tensors


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
