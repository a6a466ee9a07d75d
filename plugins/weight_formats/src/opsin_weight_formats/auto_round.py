"""AutoRound (Cheng et al. 2023), whose checkpoints are packed as GPTQ or as AWQ, or in a way of its own.

Its own is GPTQ's; whether zero points are stored one less depends on the version that wrote them. So it is
read only where the stored zero points say it themselves: all are those of symmetric codes, or one less.
"""

from __future__ import annotations

from torch import Tensor

from opsin.api import QuantizedWeight, StoredModule
from opsin_weight_formats import awq, gptq
from opsin_weight_formats.packing import MIDDLE, part, unpacked


def decode(stored: StoredModule) -> QuantizedWeight | Tensor:
    """See `opsin.api.WeightFormatSpec.decode`."""
    packing = str(stored.settings.get("packing_format") or "auto_round")
    if "awq" in packing:
        return awq.decode(stored)
    if "gptq" in packing:
        return gptq.decode_words(stored, zero_offset=1)
    bits = stored.settings.get("bits")
    if bits not in MIDDLE:
        raise ValueError(f"weights of {bits} bits; expected 4 or 8")
    zeros = unpacked(part(stored, "qzeros"), bits)
    offsets = [offset for offset in (0, 1) if bool((zeros.int() + offset == MIDDLE[bits]).all())]
    if not offsets:
        raise ValueError(
            f"packing_format is {packing!r} and zero points differ, which says nothing certain about how "
            "they are stored; expected auto_round:auto_gptq or auto_round:auto_awq"
        )
    return gptq.decode_words(stored, zero_offset=offsets[0])
