"""compressed-tensors, as llm-compressor writes it.

pack-quantized: ``weight_packed`` int32 (N, K * bits / 32), codes along the inputs, the middle code added;
``weight_scale`` (N, G); ``weight_shape`` (N, K); ``weight_zero_point`` int32 (N * bits / 32, G), packed along
the outputs; ``weight_g_idx`` (K,). int-quantized: ``weight`` int8 (N, K) and ``weight_scale`` (N, G).
float-quantized: ``weight`` float8. What is written is told by the tensors, not by the lists in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opsin.api import QuantizedWeight, StoredModule
from opsin_weight_formats.fp8 import scaled
from opsin_weight_formats.packing import MIDDLE, by_input, integer_weight, part, sorted_groups, unpacked


def decode(stored: StoredModule) -> QuantizedWeight | Tensor:
    """See `opsin.api.WeightFormatSpec.decode`."""
    if "weight_packed" in stored.tensors:
        return _packed(stored)
    weight, scale = part(stored, "weight"), part(stored, "weight_scale")
    if weight.dtype != torch.int8:
        return scaled(weight, scale, by_block=False)
    rows = weight.shape[0]
    scales = _per_row(scale, rows)
    zeros = stored.tensors.get("weight_zero_point")
    return integer_weight(
        weight.view(torch.uint8) ^ 0x80,
        None if zeros is None else _per_row(zeros, rows).int() + 128,
        scales,
        8,
        round_activations=_rounds_activations(stored.settings),
    )


def _packed(stored: StoredModule) -> QuantizedWeight | Tensor:
    words, scales = part(stored, "weight_packed"), part(stored, "weight_scale")
    rows, wide = part(stored, "weight_shape").tolist()
    fits = [bits for bits in MIDDLE if words.shape == (rows, -(-wide * bits // 32))]
    if len(fits) != 1:
        raise ValueError(
            f"weight_packed is {tuple(words.shape)}, weight_shape {(rows, wide)}; expected 4 or 8 bits"
        )
    [bits] = fits
    codes = unpacked(words, bits)[:, :wide]
    scales = _per_row(scales, rows)
    zeros = stored.tensors.get("weight_zero_point")
    if zeros is not None:
        zeros = unpacked(zeros.T, bits)[:, :rows].T
    group_of = stored.tensors.get("weight_g_idx")
    if group_of is not None and bool((group_of < 0).any()):
        group_of = None  # "-1" throughout: nothing was shuffled
    found = sorted_groups(codes, group_of, scales.shape[1])
    if found is None:
        assert group_of is not None
        middle = torch.full(scales.shape, MIDDLE[bits]) if zeros is None else zeros
        return by_input(codes, middle, scales, group_of)
    return integer_weight(
        found[0], zeros, scales, bits, order=found[1], round_activations=_rounds_activations(stored.settings)
    )


def _per_row(values: Tensor, rows: int) -> Tensor:
    """(N, G) of values per tensor, row or group."""
    if values.numel() == 1:
        return values.reshape(1, 1).expand(rows, 1)
    return values.reshape(rows, -1)


def _rounds_activations(settings: Mapping[str, Any]) -> bool:
    """Whether all groups of config.json say that activations are integers of 8 bits."""
    groups = list((settings.get("config_groups") or {}).values())
    inputs = [group.get("input_activations") for group in groups if isinstance(group, dict)]
    return bool(inputs) and all(
        given is not None and given.get("num_bits") == 8 and given.get("type", "int") == "int"
        for given in inputs
    )
