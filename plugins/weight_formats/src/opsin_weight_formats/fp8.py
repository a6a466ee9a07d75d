"""8-bit floats with a scale per tensor, per row, or per block of 128 x 128. They become floats."""

from __future__ import annotations

import torch
from torch import Tensor

from opsin.api import StoredModule
from opsin_weight_formats.packing import part

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def decode(stored: StoredModule) -> Tensor:
    """See `opsin.api.WeightFormatSpec.decode`."""
    weight = part(stored, "weight")
    if "weight_scale_inv" in stored.tensors:
        return scaled(weight, stored.tensors["weight_scale_inv"], by_block=True, settings=stored.settings)
    return scaled(weight, part(stored, "weight_scale"), by_block=False)


def scaled(weight: Tensor, scale: Tensor, *, by_block: bool, settings: object = None) -> Tensor:
    """float32 (N, K) of a weight of 8-bit floats and its scales.

    Raises:
        ValueError: the weight is none of 8-bit floats, or scales do not fit it.
    """
    if weight.dtype not in _FLOAT8 or weight.ndim != 2:
        raise ValueError(
            f"weight is {tuple(weight.shape)} of {weight.dtype}; expected two-dimensional float8"
        )
    rows, wide = weight.shape
    scale = scale.float()
    if by_block:
        size = settings.get("weight_block_size") if isinstance(settings, dict) else None
        tall, broad = size or (128, 128)
        if scale.shape != (-(-rows // tall), -(-wide // broad)):
            raise ValueError(
                f"scales are {tuple(scale.shape)} for blocks of {tall} x {broad} of {tuple(weight.shape)}"
            )
        scale = scale.repeat_interleave(tall, 0)[:rows].repeat_interleave(broad, 1)[:, :wide]
    elif scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif scale.numel() == rows:
        scale = scale.reshape(rows, 1)
    else:
        raise ValueError(f"scales are {tuple(scale.shape)} for a weight {tuple(weight.shape)}")
    return weight.float() * scale
