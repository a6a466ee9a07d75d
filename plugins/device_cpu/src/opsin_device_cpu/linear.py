"""Linear layers. Why these ways, with numbers, and what was rejected: docs/decisions/0020-cpu-linear.md.

Few rows (decoding) are bound by reading the weight, many (prefill, vision) by arithmetic:

    many rows   oneDNN over a weight in its blocked layout, bias and activation fused; the original goes
    few rows    the same; or, in a decoder, a second copy in float16 where that loses nothing (see
                `opsin_device_cpu.half`): half the bytes to read
    shared      a weight that is also the embedding table stays as it is; oneDNN takes it unpacked

Without bfloat16 instructions a bfloat16 layer multiplies in float32 and rounds its result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.api import Activation, LinearFn
from opsin_device_cpu.half import Float16Copies

PACK_MIN_BYTES = 2**20
"""A oneDNN call costs ~20 µs more than torch's own; below this size packing cannot win that back."""

MAX_FEW_ROWS = 12
"""Up to here a float16 copy is faster than the packed float32 weight."""

MAX_GEMV_ROWS = 3
"""Up to here torch's own product reads an unpacked weight at memory speed; oneDNN is the faster above."""

MAX_FEW_BFLOAT16_ROWS = 256
"""Without bfloat16 instructions: up to here a float16 copy is faster than widening the weight."""

MAX_NATIVE_BFLOAT16_ROWS = 12
"""Without them and without a copy: up to here oneDNN's bfloat16 product is, where it has one."""

WIDEN_ELEMENTS = 2**22
"""A bfloat16 weight is widened in tiles of this many elements (16 MiB of float32)."""

_POST_OPS: Mapping[Activation | None, tuple[str, str]] = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}
"""Activations that oneDNN applies while a result is still in registers: its name, its algorithm."""

_ON_RESULT: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x.mul_(torch.mul(x, 1.702).sigmoid_()),
}


class LinearPreparer:
    """`opsin.api.PrepareLinear` of one engine.

    Args:
        copies: makes float16 copies, within a budget.
        bfloat16_instructions: whether the processor multiplies bfloat16 by itself.
    """

    def __init__(self, copies: Float16Copies, *, bfloat16_instructions: bool) -> None:
        self.copies = copies
        self._bfloat16_instructions = bfloat16_instructions

    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation | None,
        *,
        keep_weight: bool,
        few_rows: bool = False,
    ) -> LinearFn:
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
        if weight.nbytes < PACK_MIN_BYTES or not torch.backends.mkldnn.is_available():
            return _torch(weight, bias, activation)
        narrow = weight.dtype == torch.bfloat16
        native = narrow and self._bfloat16_instructions
        few = self._half(weight, bias, activation) if few_rows and not native else None
        if narrow and not native:
            if few is not None:
                limit = MAX_FEW_BFLOAT16_ROWS
            elif onednn_takes_bfloat16():
                few, limit = _onednn(weight, bias, activation), MAX_NATIVE_BFLOAT16_ROWS
            else:
                few, limit = _torch(weight, bias, activation), MAX_GEMV_ROWS
            return _by_rows(few, limit, _widened(weight, bias, activation), weight.shape[1])
        if not keep_weight:
            many = _onednn(_pack(weight), bias, activation)
            return many if few is None else _by_rows(few, MAX_FEW_ROWS, many, weight.shape[1])
        limit = MAX_GEMV_ROWS if few is None else MAX_FEW_ROWS
        few = few or _torch(weight, bias, activation)
        return _by_rows(few, limit, _onednn(weight, bias, activation), weight.shape[1])

    def _half(self, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> LinearFn | None:
        """Over a float16 copy, if there is one."""
        copy, dtype = self.copies.linear(weight, bias), weight.dtype  # holds no reference to the weight
        if copy is None or dtype == torch.float32:
            return copy and then(copy, activation)
        return then(lambda x: copy(x.float()).to(dtype), activation)


def onednn_takes_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor, if slowly: it refuses with AVX2 alone."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _by_rows(few: LinearFn, max_few: int, many: LinearFn, in_features: int) -> LinearFn:
    limit = max_few * in_features
    return lambda x: few(x) if x.numel() <= limit else many(x)


def then(linear: LinearFn, activation: Activation | None) -> LinearFn:
    """A layer and the activation behind it, which may work in place on its result."""
    if activation is None:
        return linear
    act = _ON_RESULT[activation]
    return lambda x: act(linear(x))


def _torch(weight: Tensor, bias: Tensor | None, activation: Activation | None) -> LinearFn:
    return then(lambda x: F.linear(x, weight, bias), activation)


def _pack(weight: Tensor) -> Tensor:
    """A copy in oneDNN's blocked layout. The hint of 16 rows gives the layout that serves 1 to 2,048 best."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    return packed


def _onednn(weight: Tensor, bias: Tensor | None, activation: Activation | None) -> LinearFn:
    """``weight`` packed, or as it is."""
    call = torch.ops.mkldnn._linear_pointwise.default
    fused = activation in _POST_OPS
    name, algorithm = _POST_OPS[activation if fused else None]

    def linear(x: Tensor) -> Tensor:
        y: Tensor = call(x, weight, bias, name, [], algorithm)
        return y

    return linear if fused else then(linear, activation)


def _widened(weight: Tensor, bias: Tensor | None, activation: Activation | None) -> LinearFn:
    """A bfloat16 weight multiplied in float32, tile by tile."""
    out_features, in_features = weight.shape
    tile = max(1, WIDEN_ELEMENTS // in_features)
    wide_bias = torch.zeros(out_features) if bias is None else bias.float()

    def linear(x: Tensor) -> Tensor:
        rows = x.reshape(-1, in_features).float()
        y = x.new_empty(rows.shape[0], out_features)
        wide = weight.new_empty(min(tile, out_features), in_features, dtype=torch.float32)
        for part, part_bias, target in zip(weight.split(tile), wide_bias.split(tile), y.split(tile, 1)):
            target.copy_(F.linear(rows, wide[: part.shape[0]].copy_(part), part_bias))
        return y.view(*x.shape[:-1], out_features)

    return then(linear, activation)
