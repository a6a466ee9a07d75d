"""Which kernel serves which op: what is right on this card, under what the switches say.

Queries that are declined run on the reference in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opsin.api import Activation, KernelQuery, OpName
from opsin_device_mlu import attention, linear, norms
from opsin_device_mlu.attention import HeadsFirstKVLayer, MluPlan
from opsin_device_mlu.device import current
from opsin_device_mlu.measured import Declined, Measured, Paged, measured
from opsin_device_mlu.ops import find_ops
from opsin_device_mlu.settings import Settings

MAX_GROUP = 128
"""Query heads per key head that the decoding kernel takes."""

_PAGED: tuple[OpName, ...] = ("plan_attention", "write_kv", "paged_attention")


def supports(query: KernelQuery) -> bool:
    """Whether the vendor's package serves this: it is listed, and was right where it was tried."""
    return refusal(query) is None


def refusal(query: KernelQuery) -> str | None:
    """Why a query is declined, or None."""
    try:
        settings = Settings.read()
    except ValueError as error:  # `open` has said so, or will
        return str(error)
    if query.weight is not None and not linear.serves(query.weight):
        return f"weight_only_quant_matmul takes no {query.weight}"
    if query.op == "rotary" and (query.head_size is None or query.head_size % 2 or query.head_size > 256):
        return f"apply_rotary takes no heads of {query.head_size}"
    if query.op in (*_PAGED, "dense_attention"):
        heads, kv_heads, size = query.num_heads, query.num_kv_heads, query.head_size
        assert heads is not None
        assert kv_heads is not None
        assert size is not None
        if heads % kv_heads or heads // kv_heads > MAX_GROUP:
            return f"{heads} query heads over {kv_heads} are not grouped as the kernels take them"
        if attention.fitting(size, settings.head_sizes) is None:
            return f"heads of {size} are larger than the kernels take"
    try:
        found = here()
        if found is None:
            return find_ops(settings).missing or "no card is open"
        _ask(found, query, settings)
    except Declined as error:
        return str(error)
    return None


def here() -> Measured | None:
    """What is known of the current card; None: there is none, or no package."""
    settings = Settings.read()
    ops = find_ops(settings)
    if ops.missing:
        return None
    card = current()
    return None if card is None else measured(ops, settings, *card)


def _known() -> Measured:
    found = here()
    assert found is not None, "the card has served a query before"
    return found


def _ask(found: Measured, query: KernelQuery, settings: Settings) -> object:
    """The kernel for a query.

    Raises:
        Declined: there is none.
    """
    dtype = getattr(torch, query.dtype)
    size = attention.fitting(query.head_size or 0, settings.head_sizes) or 0
    if query.op == "prepare_quantized_linear":
        assert query.weight is not None
        return found.quantized_product(dtype, query.weight)
    asked: Mapping[OpName, Callable[[], object]] = {
        "rms_norm": lambda: found.rms_norm(dtype),
        "layer_norm": lambda: found.layer_norm(dtype),
        "gated_act": lambda: found.gated_act(dtype, query.activation or "silu"),
        "rotary": lambda: found.rotary(dtype),
        **dict.fromkeys(_PAGED, lambda: found.paged(dtype, size)),
        "dense_attention": lambda: found.dense_attention(dtype, size),
        "prepare_linear": lambda: found.product(dtype),
    }
    return asked[query.op]()


def load(op: OpName) -> Callable[..., Any]:
    """The kernel of an op that `supports` accepted: for each dtype and size, the one that was right."""
    return _LOADERS[op](_known(), Settings.read())


def _rms_norm(found: Measured, settings: Settings) -> Callable[..., Any]:
    kernels = _ByDtype(found.rms_norm)

    def rms_norm(
        x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        kernel: norms.RmsNorm = kernels[x.dtype]
        return kernel(x, weight, eps, residual)

    return rms_norm


def _layer_norm(found: Measured, settings: Settings) -> Callable[..., Any]:
    kernels = _ByDtype(found.layer_norm)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        kernel: norms.LayerNorm = kernels[x.dtype]
        return kernel(x, weight, bias, eps)

    return layer_norm


def _gated_act(found: Measured, settings: Settings) -> Callable[..., Any]:
    kernels: dict[tuple[torch.dtype, Activation], norms.GatedAct] = {}

    def gated_act(x: Tensor, activation: Activation) -> Tensor:
        if (x.dtype, activation) not in kernels:
            kernels[x.dtype, activation] = found.gated_act(x.dtype, activation)
        return kernels[x.dtype, activation](x, activation)

    return gated_act


def _rotary(found: Measured, settings: Settings) -> Callable[..., Any]:
    kernels = _ByDtype(found.rotary)

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        kernel: norms.Rotary = kernels[q.dtype]
        return kernel(q, k, cos, sin)

    return rotary


def _write_kv(found: Measured, settings: Settings) -> Callable[..., Any]:
    def write_kv(k: Tensor, v: Tensor, layer: HeadsFirstKVLayer, plan: MluPlan) -> None:
        _paged(found, layer).write(k, v, layer, plan)

    return write_kv


def _paged_attention(found: Measured, settings: Settings) -> Callable[..., Any]:
    def paged_attention(q: Tensor, layer: HeadsFirstKVLayer, plan: MluPlan, scale: float) -> Tensor:
        return _paged(found, layer).attend(q, layer, plan, scale)

    return paged_attention


def _paged(found: Measured, layer: HeadsFirstKVLayer) -> Paged:
    return found.paged(layer.keys.dtype, layer.keys.shape[-1])


def _dense_attention(found: Measured, settings: Settings) -> Callable[..., Any]:
    kernels: dict[tuple[torch.dtype, int], attention.DenseAttention] = {}

    def dense_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_lens: Sequence[int],
        k_lens: Sequence[int] | None,
        scale: float,
    ) -> Tensor:
        size = attention.fitting(q.shape[-1], settings.head_sizes)
        assert size is not None, "declined when the layer was bound"
        if (q.dtype, size) not in kernels:
            kernels[q.dtype, size] = found.dense_attention(q.dtype, size)
        return kernels[q.dtype, size](q, k, v, q_lens, k_lens, scale)

    return dense_attention


class _ByDtype(dict[torch.dtype, Any]):
    """Kernels by the dtype of what they are given, looked up once."""

    def __init__(self, find: Callable[[torch.dtype], Any]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, dtype: torch.dtype) -> Any:
        kernel = self[dtype] = self._find(dtype)
        return kernel


_LOADERS: Mapping[OpName, Callable[[Measured, Settings], Callable[..., Any]]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "gated_act": _gated_act,
    "rotary": _rotary,
    "plan_attention": lambda found, settings: attention.plan_attention,
    "write_kv": _write_kv,
    "paged_attention": _paged_attention,
    "dense_attention": _dense_attention,
    "prepare_linear": lambda found, settings: linear.LinearPreparer(found.product),
    "prepare_quantized_linear": lambda found, settings: linear.QuantizedPreparer(found.quantized_product),
}
