"""Ready-made picture embeddings, as users pass them -> one tensor per picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def split_image_embeds(data: Any, num_rows: int | None = None) -> list[Tensor]:
    """(images, E, H), or a list of (E, H), or one (E, H) -> (E, H) of each picture.

    Args:
        data: the user's input.
        num_rows: E, where it is the same for all pictures.

    Raises:
        ValueError: another layout.
    """
    wanted = f"({num_rows or 'features'}, hidden)"
    parts = [data] if isinstance(data, Tensor) else data
    if not isinstance(parts, Sequence) or not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(
            f"image embeddings of this family are a tensor (images, {wanted[1:]} or a list of tensors "
            f"{wanted}, got a {type(data).__name__}"
        )
    items: list[Tensor] = []
    for part in parts:
        if part.layout != torch.strided:
            raise ValueError(f"image embeddings must be dense tensors, got {part.layout}")
        items += part.unbind(0) if part.ndim == 3 else [part]
    for item in items:
        if item.ndim != 2 or item.shape[0] == 0 or num_rows not in (None, item.shape[0]):
            raise ValueError(f"the embeddings of an image have shape {tuple(item.shape)}, expected {wanted}")
    return items
