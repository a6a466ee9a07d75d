"""8-bit pixels -> the values an image processor of transformers gives, float for float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def pixel_levels(
    settings: Mapping[str, Any], *, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Array:
    """The value of each of the 256 levels of each channel after rescaling and normalising.

    The table has exactly the floats of transformers (``image_transforms.rescale`` in float64, rounded to
    float32; ``normalize`` in float32), in one pass over the pixels.

    Args:
        settings: preprocessor_config.json: ``do_rescale``, ``rescale_factor``, ``do_normalize``,
            ``image_mean``, ``image_std``.
        mean: of each channel, where the settings have none.
        std: the same.

    Returns:
        float32 (3, 256).
    """
    levels: Array = np.arange(256, dtype=np.float64)
    if settings.get("do_rescale", True):
        levels = levels * float(settings.get("rescale_factor", 1 / 255))
    table = np.broadcast_to(levels.astype(np.float32), (3, 256))
    if settings.get("do_normalize", True):
        means = np.asarray(settings.get("image_mean") or mean, np.float32)[:, None]
        stds = np.asarray(settings.get("image_std") or std, np.float32)[:, None]
        table = (table - means) / stds
    return np.ascontiguousarray(table)


def pixel_values(pixels: Array, levels: Array) -> Tensor:
    """uint8 (..., H, W, 3) and `pixel_levels` -> float32 (..., 3, H, W)."""
    values = np.empty((*pixels.shape[:-3], 3, *pixels.shape[-3:-1]), np.float32)
    for channel in range(3):
        np.take(levels[channel], pixels[..., channel], out=values[..., channel, :, :])
    return torch.from_numpy(values)
