"""Linear layers on packed weights. Numbers and rejected ways: docs/decisions/0020-cpu-linear-layers.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.api import Activation, LinearFn

PACK_MIN_BYTES = 2**20
"""A oneDNN call costs ~20 µs more than torch's; below this size a packed weight cannot win that back."""

MAX_ROWS_PLAIN = 3
"""Up to this many rows torch's own GEMV reads an unpacked weight at memory speed; from there on oneDNN,
which accepts it unpacked too, is up to twice as fast."""


@dataclass(frozen=True)
class _PostOp:
    """An activation as oneDNN does it while a result is still in registers."""

    name: str = "none"
    algorithm: str = ""


_POST_OPS: Mapping[Activation | None, _PostOp] = {
    None: _PostOp(),
    "gelu": _PostOp("gelu", "none"),
    "gelu_tanh": _PostOp("gelu", "tanh"),
    "silu": _PostOp("swish"),
}


def _quick_gelu_(x: Tensor) -> Tensor:
    return x.mul_(torch.mul(x, 1.702).sigmoid_())


_IN_PLACE: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": _quick_gelu_,
}


def prepare_linear(
    weight: Tensor, bias: Tensor | None, activation: Activation | None, *, keep_weight: bool
) -> LinearFn:
    """`opsin.api.PrepareLinear`: packs a large weight unless it is used elsewhere; fuses bias, activation."""
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if not torch.backends.mkldnn.is_available() or weight.nbytes < PACK_MIN_BYTES:
        return _plain(weight, bias, activation)
    if keep_weight:
        return _shared(weight, bias, activation)
    return _packed(weight, bias, activation)


def _plain(weight: Tensor, bias: Tensor | None, activation: Activation | None) -> LinearFn:
    if activation is None:
        return lambda x: F.linear(x, weight, bias)
    act = _IN_PLACE[activation]
    return lambda x: act(F.linear(x, weight, bias))


def _packed(weight: Tensor, bias: Tensor | None, activation: Activation | None) -> LinearFn:
    """Over a copy in oneDNN's blocked layout; the caller drops the original."""
    # The batch size is a hint: the layout for 16 rows also serves 1 and 2,048 best (see the decision page).
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    return _onednn(packed, bias, activation)


def _shared(weight: Tensor, bias: Tensor | None, activation: Activation | None) -> LinearFn:
    """Straight from the original, e.g. a tied embedding table, without a second copy in memory."""
    few, many = _plain(weight, bias, activation), _onednn(weight, bias, activation)
    in_features = weight.shape[1]
    limit = MAX_ROWS_PLAIN * in_features

    def linear(x: Tensor) -> Tensor:
        return few(x) if x.numel() <= limit else many(x)

    return linear


def _onednn(weight: Tensor, bias: Tensor | None, activation: Activation | None) -> LinearFn:
    call = torch.ops.mkldnn._linear_pointwise.default
    post = _POST_OPS.get(activation)
    if post is not None:
        name, algorithm = post.name, post.algorithm

        def fused(x: Tensor) -> Tensor:
            y: Tensor = call(x, weight, bias, name, [], algorithm)
            return y

        return fused
    assert activation is not None
    act = _IN_PLACE[activation]
    return lambda x: act(call(x, weight, bias, "none", [], ""))
