"""Linear layers over torch_mlu_ops: bias and activation fused, weights in float or in int8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.api import Activation, LinearFn

_FUSED: frozenset[Activation] = frozenset({"silu", "gelu"})
"""Activations that every version of matmul knows by these names."""

_ON_RESULT: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}

_INT8_MAX = 127


class LinearPreparer:
    """`opsin.api.PrepareLinear`.

    Args:
        matmul: of torch_mlu_ops.
        fused_activation: whether it may apply activations.
        int8: ``weight_only_quant_matmul``, to keep weights as int8; None: as they are.
    """

    def __init__(
        self, matmul: Callable[..., Any], *, fused_activation: bool, int8: Callable[..., Any] | None
    ) -> None:
        self._matmul, self._fused_activation, self._int8 = matmul, fused_activation, int8

    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation | None,
        *,
        keep_weight: bool,
        few_rows: bool = False,
    ) -> LinearFn:
        weight = weight.contiguous()
        fused = activation in _FUSED and self._fused_activation
        mode = activation if fused and activation is not None else "none"
        act = None if activation is None or fused else _ON_RESULT[activation]
        # The output head decides between neighbours, and its weight is often the embedding table: kept whole.
        if self._int8 is not None and weight.dtype == torch.float16 and not keep_weight:
            product = _over_int8(self._int8, weight, bias, mode)
        else:
            product = _over_floats(self._matmul, weight, bias, mode)
        out_features = weight.shape[0]

        def linear(x: Tensor) -> Tensor:
            shape = (*x.shape[:-1], out_features)
            if x.numel() == 0:
                return x.new_empty(shape)
            y = product(x.reshape(-1, x.shape[-1]).contiguous())
            return (y if act is None else act(y)).view(shape)

        return linear


def _over_floats(matmul: Callable[..., Any], weight: Tensor, bias: Tensor | None, mode: str) -> LinearFn:
    def product(rows: Tensor) -> Tensor:
        y: Tensor = matmul(rows, weight, bias, None, mode, 1.0, 0.0)
        return y

    return product


def _over_int8(function: Callable[..., Any], weight: Tensor, bias: Tensor | None, mode: str) -> LinearFn:
    """Rounded to 127 levels of each output row's largest weight."""
    quantized, scale = quantize_rows(weight)

    def product(rows: Tensor) -> Tensor:
        y: Tensor = function(rows, quantized, scale, None, bias, None, mode, 8, 1.0, 1.0)
        return y

    return product


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> int8 (out, in) and float32 scales (out,)."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1).clamp(min=1e-12) / _INT8_MAX
    return torch.round(wide / scale.unsqueeze(1)).to(torch.int8), scale
