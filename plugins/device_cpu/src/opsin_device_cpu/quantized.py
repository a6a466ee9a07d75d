"""Linear layers over weights of fewer bits, in torch alone. Numbers: docs/decisions/0072-cpu-rows.md.

    int8, scale per row, activations rounded    oneDNN's integer product over rows that are rounded here, one
                                                scale each, so that a row's result never depends on others
    all other forms                             exact: a tile of rows becomes floats, and is multiplied

Not ``quantized.linear_dynamic``: it takes one scale for all rows of a step, and a row beside one 50 times
larger would be 40% off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.api import Activation, KernelQuery, LinearFn, QuantizedWeight
from opsin_device_cpu.linear import then

TILE_ELEMENTS = 2**20
"""Weights become floats in tiles of about so many elements (4 MiB of float32)."""

ZERO = 128
"""oneDNN takes activations as uint8; this one means zero."""


@cache
def has_integer_product() -> bool:
    """Whether this torch has oneDNN's product of integers, and it gives here what it should."""
    try:
        weight = (torch.arange(64 * 32).view(64, 32) % 255 - 127).to(torch.int8)
        rows = (torch.arange(3 * 32).view(3, 32) * 37 % 256).to(torch.uint8)
        found = _integer_product(weight, torch.ones(64))(rows)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    expected = (rows.int() - ZERO) @ weight.int().T
    return bool(torch.equal(found, expected.float()))


def supports(query: KernelQuery) -> bool:
    """Whether there is a way for a `opsin.api.PrepareQuantizedLinear` query; exact ones there always are."""
    form = query.weight
    assert form is not None
    if not form.round_activations:
        return True
    return form.kind == "int8" and form.group_size is None and not form.zero_points and has_integer_product()


def prepare_quantized_linear(
    weight: QuantizedWeight,
    bias: Tensor | None,
    activation: Activation | None,
    *,
    keep_weight: bool,
    few_rows: bool = False,
) -> LinearFn:
    """`opsin.api.PrepareQuantizedLinear`."""
    linear = _rounding_rows(weight, bias) if weight.form.round_activations else _by_tiles(weight, bias)
    ordered = linear
    if weight.order is not None:
        order = weight.order

        def ordered(x: Tensor) -> Tensor:
            return linear(x.index_select(-1, order))

    return then(ordered, activation)


def _rounding_rows(weight: QuantizedWeight, bias: Tensor | None) -> LinearFn:
    """x (..., K) float32 or bfloat16 -> x @ W.T + bias, x rounded to 8 bits with one scale per row."""
    wide, out_features = weight.in_features, weight.shape[0]
    product = _integer_product(weight.codes, weight.scales.flatten())
    wide_bias = None if bias is None else bias.float()

    def linear(x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], out_features)
        rows = x.reshape(-1, wide)
        if len(rows) == 0:
            return x.new_empty(shape)
        low, high = rows.aminmax(dim=-1, keepdim=True)
        scale = torch.maximum(high, -low).float().div_(127).clamp_(min=1e-30)
        codes = torch.div(rows, scale).round_().add_(ZERO).to(torch.uint8)
        y = product(codes)
        y = y.mul_(scale) if wide_bias is None else torch.addcmul(wide_bias, y, scale, out=y)
        return y.to(x.dtype).view(shape)

    return linear


def _integer_product(codes: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
    """Over codes int8 (N, K) and scales float32 (N): uint8 (M, K) around `ZERO` -> float32 (M, N)."""
    call: Any = torch.ops.onednn.qlinear_pointwise.default
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    zeros = torch.zeros(len(scales), dtype=torch.int64)

    def product(rows: Tensor) -> Tensor:
        y: Tensor = call(rows, 1.0, ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        return y

    return product


def _by_tiles(weight: QuantizedWeight, bias: Tensor | None) -> LinearFn:
    """The exact product: some rows of the weight at a time become floats."""
    wide, out_features = weight.in_features, weight.shape[0]
    plain = replace(weight, order=None)  # the input has been put in order
    tile = max(1, TILE_ELEMENTS // wide)
    tiles = [plain.narrow(0, at, min(tile, out_features - at)) for at in range(0, out_features, tile)]
    biases = [None] * len(tiles) if bias is None else bias.float().split(tile)

    def linear(x: Tensor) -> Tensor:
        rows = x.reshape(-1, wide).float()
        parts = [F.linear(rows, part.dequantize(torch.float32), b) for part, b in zip(tiles, biases)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y.to(x.dtype).view(*x.shape[:-1], out_features)

    return linear
