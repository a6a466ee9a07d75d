"""AWQ (Lin et al. 2023), in AutoAWQ's layout "gemm".

``qweight`` int32 (K, N / 8) and ``qzeros`` int32 (G, N / 8): codes along the outputs, in each word those of
outputs 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits upwards. ``scales`` (G, N). W = (code - zero) * scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsin.api import QuantizedWeight, StoredModule
from opsin_weight_formats.packing import integer_weight, part, unpacked

_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the code of each of its outputs stands."""


def decode(stored: StoredModule) -> QuantizedWeight:
    """See `opsin.api.WeightFormatSpec.decode`."""
    settings = stored.settings
    version = str(settings.get("version") or "gemm").lower()
    if version != "gemm":
        raise ValueError(f"version is {version!r}; expected gemm")
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise ValueError(f"weights of {bits} bits; expected 4")
    codes, zeros = (_in_order(part(stored, name)).T for name in ("qweight", "qzeros"))
    return integer_weight(codes, zeros, part(stored, "scales").T, 4)


def _in_order(words: Tensor) -> Tensor:
    """int32 (R, N / 8) -> uint8 (R, N)."""
    codes: Tensor = unpacked(words, 4).unflatten(1, (-1, 8))
    return codes.index_select(2, torch.tensor(_PLACE)).flatten(1)
