"""Ready-made embeddings, as users pass them -> one tensor per item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


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
