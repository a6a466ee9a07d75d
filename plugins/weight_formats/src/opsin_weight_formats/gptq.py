"""GPTQ (Frantar et al. 2022), as AutoGPTQ and GPTQModel store it.

``qweight`` int32 (K * bits / 32, N): codes along the inputs. ``qzeros`` int32 (G, N * bits / 32): codes along
the outputs, one less than the zero point (with ``checkpoint_format: gptq_v2`` itself). ``scales`` (G, N).
``g_idx`` (K,): the group of each input, which act-order shuffles. W = (code - zero) * scale.
"""

from __future__ import annotations

from torch import Tensor

from opsin.api import QuantizedWeight, StoredModule
from opsin_weight_formats.packing import MIDDLE, by_input, integer_weight, part, sorted_groups, unpacked


def decode(stored: StoredModule) -> QuantizedWeight | Tensor:
    """See `opsin.api.WeightFormatSpec.decode`."""
    layout = stored.settings.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format is {layout!r}; expected gptq or gptq_v2")
    return decode_words(stored, zero_offset=layout == "gptq")


def decode_words(stored: StoredModule, *, zero_offset: int) -> QuantizedWeight | Tensor:
    """The same, with what is added to stored zero points."""
    words, scales = part(stored, "qweight"), part(stored, "scales")
    group_of = stored.tensors.get("g_idx")
    bits = _bits(stored, words, group_of)
    codes = unpacked(words.T, bits)
    zeros = (unpacked(part(stored, "qzeros"), bits).int() + zero_offset).T
    scales = scales.T
    found = sorted_groups(codes, group_of, scales.shape[1])
    if found is None:
        assert group_of is not None
        return by_input(codes, zeros, scales, group_of)
    return integer_weight(found[0], zeros, scales, bits, order=found[1])


def _bits(stored: StoredModule, words: Tensor, group_of: Tensor | None) -> int:
    """Of a code: what the tensors say, since modules may have bits of their own."""
    if group_of is None:
        bits = stored.settings.get("bits", stored.settings.get("w_bit"))
    else:
        bits = words.shape[0] * 32 / len(group_of)
    if bits not in MIDDLE:
        raise ValueError(f"weights of {bits} bits; expected 4 or 8")
    return int(bits)
