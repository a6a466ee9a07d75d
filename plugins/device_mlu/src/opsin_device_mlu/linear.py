"""Linear layers over torch_mlu_ops: bias and activation fused, weights as floats or of fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.api import Activation, LinearFn, QuantizedWeight, WeightForm

ON_RESULT: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
"""In torch's own ops: where the vendor's are switched off, missing or other."""

GROUP_SIZES = (64, 128, 256, 512)
"""Inputs that may share a scale (manual 5.1.38)."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """One way to ask ``matmul`` or ``weight_only_quant_matmul`` for a product.

    Attributes:
        call: the function.
        no_activation: what ``act_mode`` is where there is none; None: it is left out.
        bias_rows: whether the bias is (1, N), as the manual prints it, rather than (N,).
        fused: activations that the function applies itself -> what they are called there.
        separate: activations that ``active`` applies to the result -> a function that does.
    """

    call: Callable[..., Any]
    no_activation: str | None = None
    bias_rows: bool = False
    fused: Mapping[Activation, str] = field(default_factory=dict)
    separate: Mapping[Activation, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def linear(
        self, tensors: Mapping[str, Any], rows: int, bias: Tensor | None, activation: Activation | None
    ) -> LinearFn:
        """A layer over a weight.

        Args:
            tensors: the weight, and what belongs to it, by the function's arguments.
            rows: of the weight.
            bias: (rows,).
            activation: of the layer.
        """
        mode = self.no_activation if activation is None else self.fused.get(activation)
        after: Callable[[Tensor], Tensor] | None = None
        if activation is not None and mode is None:
            mode, after = self.no_activation, self.separate.get(activation, ON_RESULT[activation])
        given = dict(tensors)
        given["bias"] = bias.view(1, -1) if bias is not None and self.bias_rows else bias
        if mode is not None:
            given["act_mode"] = mode
        call = self.call

        def linear(x: Tensor) -> Tensor:
            shape = (*x.shape[:-1], rows)
            if x.numel() == 0:
                return x.new_empty(shape)
            y: Tensor = call(a=x.reshape(-1, x.shape[-1]).contiguous(), **given)
            return (y if after is None else after(y)).view(shape)

        return linear


class LinearPreparer:
    """`opsin.api.PrepareLinear`: by the run dtype, a way to multiply."""

    def __init__(self, product: Callable[[torch.dtype], Product]) -> None:
        self._product = product

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
        return self._product(weight.dtype).linear({"b": weight}, weight.shape[0], bias, activation)


def serves(form: WeightForm) -> bool:
    """Whether the book has a way to multiply by weights of a form. Activations are never rounded."""
    if form.kind not in ("int8", "int4") or form.zero_points or form.round_activations:
        return False
    return form.group_size in GROUP_SIZES or (form.kind == "int8" and form.group_size is None)


class QuantizedPreparer:
    """`opsin.api.PrepareQuantizedLinear`, over ``weight_only_quant_matmul``.

    Args:
        product: by run dtype and form, a way to multiply, and whether an even input's code stands in the low
            half of a byte.
    """

    def __init__(self, product: Callable[[torch.dtype, WeightForm], tuple[Product, bool]]) -> None:
        self._product = product

    def __call__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activation: Activation | None,
        *,
        keep_weight: bool,
        few_rows: bool = False,
    ) -> LinearFn:
        linears: dict[torch.dtype, LinearFn] = {}
        order, rows = weight.order, weight.shape[0]

        def linear(x: Tensor) -> Tensor:
            if x.dtype not in linears:  # nothing but the activations tells the run dtype
                product, low_first = self._product(x.dtype, weight.form)
                tensors = arguments(weight, x.dtype, low_first=low_first)
                linears[x.dtype] = product.linear(tensors, rows, bias, activation)
            return linears[x.dtype](x if order is None else x.index_select(-1, order))

        return linear


def arguments(weight: QuantizedWeight, dtype: torch.dtype, *, low_first: bool = True) -> dict[str, Any]:
    """A weight as ``weight_only_quant_matmul`` takes it: b, scale and bit size.

    Scales are float32 (N), or of the activations' dtype (N, groups). Codes of 4 bits are signed there; the
    manual does not say which half of a byte comes first.
    """
    bits = 8 if weight.form.kind == "int8" else 4
    codes = weight.codes
    if bits == 4:
        codes = codes ^ 0x88  # 0 to 15 around 8 -> two's complement of 4 bits
        if not low_first:
            codes = (codes >> 4) | (codes << 4)
        codes = codes.view(torch.int8)
    grouped = weight.form.group_size is not None
    scale = weight.scales.to(dtype).contiguous() if grouped else weight.scales.flatten().contiguous()
    return {"b": codes.contiguous(), "scale": scale, "quant_bit_size": bits}
