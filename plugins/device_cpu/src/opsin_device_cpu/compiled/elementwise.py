"""Norms and activations by the compiled kernels: one pass over memory, one call."""

from __future__ import annotations

import torch
from torch import Tensor

from opsin.api import Activation
from opsin_device_cpu import native
from opsin_device_cpu.compiled.attention import TYPES, check

ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3}

_LIBRARY = native.library()
assert _LIBRARY is not None, native.loaded().reason
_RMS_NORM, _LAYER_NORM = _LIBRARY.opsin_rms_norm, _LIBRARY.opsin_layer_norm
_GATED, _ACTIVATE = _LIBRARY.opsin_gated, _LIBRARY.opsin_activate


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`opsin.api.RMSNorm`; with ``residual`` writes into both inputs."""
    x = x.contiguous()
    columns = x.shape[-1]
    _refuse_others(x, weight)
    if residual is None:
        h, out, stream = x, torch.empty_like(x), None
    else:
        if residual.shape != x.shape or residual.dtype is not x.dtype:
            raise ValueError(
                f"rms_norm: x {tuple(x.shape)} {x.dtype}, residual {tuple(residual.shape)} {residual.dtype}; "
                "expected the same of both"
            )
        h = residual.contiguous()
        out, stream = x, h.data_ptr()
    code = _RMS_NORM(
        TYPES[x.dtype], x.numel() // columns, columns, x.data_ptr(), columns, stream, columns,
        weight.data_ptr(), eps, out.data_ptr(), columns,
    )  # fmt: skip
    check(code, "rms_norm")
    return out, h


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`opsin.api.LayerNorm`."""
    x = x.contiguous()
    columns = x.shape[-1]
    _refuse_others(x, weight)
    if bias is not None:
        _refuse_others(x, bias)
    out = torch.empty_like(x)
    code = _LAYER_NORM(
        TYPES[x.dtype], x.numel() // columns, columns, x.data_ptr(), columns, weight.data_ptr(),
        None if bias is None else bias.data_ptr(), eps, out.data_ptr(), columns,
    )  # fmt: skip
    check(code, "layer_norm")
    return out


def _refuse_others(x: Tensor, weight: Tensor) -> None:
    """What the kernels would read outside of a norm's weight or bias, or in another dtype."""
    if weight.shape != x.shape[-1:] or weight.dtype is not x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"a norm's weight or bias {tuple(weight.shape)} {weight.dtype} for x {tuple(x.shape)} {x.dtype}; "
            "expected x's last size and dtype, without gaps"
        )


def gated_act(x: Tensor, activation: Activation) -> Tensor:
    """`opsin.api.GatedAct`."""
    x = x.contiguous()
    wide = x.shape[-1]
    columns = wide // 2
    if wide % 2:
        raise ValueError(f"gated_act: x {tuple(x.shape)}; expected an even last size")
    out = x.new_empty(*x.shape[:-1], columns)
    code = _GATED(
        TYPES[x.dtype], ACTIVATIONS[activation], x.numel() // wide, columns, x.data_ptr(), wide,
        out.data_ptr(), columns,
    )  # fmt: skip
    check(code, "gated_act")
    return out


def activate_(x: Tensor, activation: Activation) -> Tensor:
    """The activation of every element, in place; x has no gaps."""
    if not x.is_contiguous():
        raise ValueError(f"activate_: x with strides {x.stride()}; expected none but its shape's")
    check(_ACTIVATE(TYPES[x.dtype], ACTIVATIONS[activation], x.numel(), x.data_ptr()), "activate_")
    return x
