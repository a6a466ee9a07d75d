"""8-bit pixels -> the values an image processor of transformers gives, float for float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin.layers.text import fields

Array = np.ndarray[Any, Any]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_FIELDS: Mapping[str, Any] = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list | None,
    "image_std": list | None,
}


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

    Raises:
        ValueError: a setting cannot be used; the message names it.
    """
    given = fields(settings, _FIELDS)
    levels: Array = np.arange(256, dtype=np.float64)
    if given["do_rescale"]:
        levels = levels * float(given["rescale_factor"])
    table: Array = np.broadcast_to(levels.astype(np.float32), (3, 256))
    if given["do_normalize"]:
        means, stds = (
            _channels(name, given[name] or default)
            for name, default in (("image_mean", mean), ("image_std", std))
        )
        table = (table - means) / stds
    return np.ascontiguousarray(table)


def _channels(name: str, values: Sequence[Any]) -> Array:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) != len(values) or len(values) != 3 or (name == "image_std" and 0 in numbers):
        raise ValueError(f"{name} is {values!r:.80}; expected three numbers")
    return np.asarray(numbers, np.float32)[:, None]


def resampling(
    settings: Mapping[str, Any], default: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Resampling:
    """PIL's filter that preprocessor_config.json names by number as ``resample``.

    Raises:
        ValueError: there is no such filter.
    """
    number = fields(settings, {"resample": int(default)})["resample"]
    if number not in list(Image.Resampling):
        raise ValueError(f"resample is {number}; expected the number of one of PIL's filters, such as 3")
    return Image.Resampling(number)


def pixel_values(pixels: Array, levels: Array) -> Tensor:
    """uint8 (..., H, W, 3) and `pixel_levels` -> float32 (..., 3, H, W)."""
    values = np.empty((*pixels.shape[:-3], 3, *pixels.shape[-3:-1]), np.float32)
    for channel in range(3):
        np.take(levels[channel], pixels[..., channel], out=values[..., channel, :, :])
    return torch.from_numpy(values)
