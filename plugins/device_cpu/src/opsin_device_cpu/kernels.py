"""Norms, gated activation and rotary embedding in as few torch calls and memory passes as possible.

At one row a call costs more than its arithmetic (2-5 µs each), at a thousand rows every pass over the
activations counts; both are kept down by working in place on what was just made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.api import Activation


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`opsin.api.RMSNorm`; adds into ``residual``'s memory.

    The sum of squares comes from a vector norm: one pass that accumulates in float32 and writes nothing
    of x's size.
    """
    h = x if residual is None else residual.add_(x)
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.addcmul(_scalar(eps), norm, norm, value=1.0 / h.shape[-1]).rsqrt_()
    if h.dtype == torch.float32:
        return torch.mul(h, scale).mul_(weight), h
    return torch.mul(h, scale).to(h.dtype).mul_(weight), h


@cache
def _scalar(value: float) -> Tensor:
    """float32 (1,): torch makes a new tensor of a Python number at every call."""
    return torch.tensor([value])


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`opsin.api.LayerNorm`; torch's own kernel accumulates in float32."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _quick_gelu(x: Tensor) -> Tensor:
    return torch.mul(x, 1.702).sigmoid_().mul_(x)


# Each returns new memory of its own.
_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": _quick_gelu,
}


def gated_act(x: Tensor, activation: Activation) -> Tensor:
    """`opsin.api.GatedAct`."""
    gate, up = x.chunk(2, -1)
    return _ACTIVATIONS[activation](gate).mul_(up)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`opsin.api.Rotary`; writes into q and k where only a part of each head is rotated."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half_sin = sin.narrow(-1, 0, sin.shape[-1] // 2)
    return _rotate(q, cos, half_sin), _rotate(k, cos, half_sin)


def _rotate(x: Tensor, cos: Tensor, half_sin: Tensor) -> Tensor:
    """x (T, heads, D), cos (T, 1, R), half_sin (T, 1, R / 2).

    A float32 table times bfloat16 heads is promoted, so the arithmetic is float32 throughout.
    """
    width = cos.shape[-1]
    part = x if width == x.shape[-1] else x.narrow(-1, 0, width)
    turned = part * cos
    first, second = part.chunk(2, -1)
    out_first, out_second = turned.chunk(2, -1)
    if turned.dtype == x.dtype:
        out_first.addcmul_(second, half_sin, value=-1)
        out_second.addcmul_(first, half_sin)
    else:
        out_first.sub_(second * half_sin)
        out_second.add_(first * half_sin)
    if width == x.shape[-1]:
        return turned.to(x.dtype)
    part.copy_(turned)
    return x
