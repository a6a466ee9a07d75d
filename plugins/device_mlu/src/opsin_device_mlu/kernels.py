"""Which kernel serves which op: what the vendor's package offers, under what the switches say.

Queries that are declined run on the reference in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from opsin.api import Activation, KernelQuery, OpName
from opsin_device_mlu import attention, linear
from opsin_device_mlu.ops import Ops, find_ops, no_window
from opsin_device_mlu.settings import Settings

NEEDS: Mapping[OpName, tuple[str, ...]] = {
    "rms_norm": ("fused_rms_norm",),
    "layer_norm": ("fused_layer_norm",),
    "gated_act": ("active",),
    "rotary": ("apply_rotary",),
    "plan_attention": ("reshape_paged_cache", "flash_attention", "single_query_cached_kv_attn"),
    "write_kv": ("reshape_paged_cache", "flash_attention", "single_query_cached_kv_attn"),
    "paged_attention": ("reshape_paged_cache", "flash_attention", "single_query_cached_kv_attn"),
    "dense_attention": ("flash_attention",),
    "prepare_linear": ("matmul",),
}
"""Functions of torch_mlu_ops behind each op."""

MAX_GROUP = 128
"""Query heads per key head that the decoding kernel takes."""

GATES: frozenset[Activation] = frozenset({"silu", "gelu"})
"""What ``active`` knows in every version."""


def supports(query: KernelQuery) -> bool:
    """Whether the vendor's package serves this."""
    try:
        settings = Settings.read()
    except ValueError:  # `open` has said so, or will
        return False
    if query.dtype not in ("float16", "float32") or not find_ops(settings).has(*NEEDS[query.op]):
        return False
    if query.op == "gated_act":
        return query.activation in GATES
    if query.op == "rotary":
        return query.head_size is not None and query.head_size % 2 == 0 and query.head_size <= 256
    if query.op in ("plan_attention", "write_kv", "paged_attention", "dense_attention"):
        heads, kv_heads, size = query.num_heads, query.num_kv_heads, query.head_size
        assert heads is not None
        assert kv_heads is not None
        assert size is not None
        grouped = heads % kv_heads == 0 and heads // kv_heads <= MAX_GROUP
        return grouped and attention.fitting(size, settings.head_sizes) is not None
    return True


def load(op: OpName) -> Callable[..., Any]:
    """The kernel of an op that `supports` accepted."""
    settings = Settings.read()
    ops = find_ops(settings)
    return _LOADERS[op](ops, settings)


def _rms_norm(ops: Ops, settings: Settings) -> Callable[..., Any]:
    function = ops.functions["fused_rms_norm"]

    def rms_norm(
        x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        if residual is None:
            return function(x, None, weight, None, None, eps, False), x
        normed, h = function(x, residual.contiguous(), weight, None, None, eps, True)
        return normed, h

    return rms_norm


def _layer_norm(ops: Ops, settings: Settings) -> Callable[..., Any]:
    function = ops.functions["fused_layer_norm"]

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        normed: Tensor = function(x.contiguous(), None, weight, bias, None, eps, False)
        return normed

    return layer_norm


def _gated_act(ops: Ops, settings: Settings) -> Callable[..., Any]:
    function = ops.functions["active"]

    def gated_act(x: Tensor, activation: Activation) -> Tensor:
        gated: Tensor = function(x.contiguous(), activation, True)
        return gated

    return gated_act


class Rotary:
    """`opsin.api.Rotary`, in place on q and k joined in one tensor, as the kernel wants them.

    Args:
        function: ``apply_rotary``.
        in_place: if q and k stand beside each other in memory, as a fused projection leaves them, rotate them
            there. The rows of that tensor are further apart than they are long.
    """

    def __init__(self, function: Callable[..., Any], *, in_place: bool) -> None:
        self._function, self._in_place = function, in_place
        self._seen: tuple[Tensor, Tensor, torch.dtype] | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._in_dtype(cos, sin, q.dtype)
        if self._in_place and _stand_together(q, k):
            self._rotate(_joined(q, k), cos, sin)
            return q, k
        both = torch.cat((q, k), dim=1)
        self._rotate(both, cos, sin)
        rotated_q, rotated_k = both.split([q.shape[1], k.shape[1]], dim=1)
        return rotated_q, rotated_k

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """x (T, heads, D), the tables (T, R): token i takes row i, as one padded sequence of T tokens."""
        self._function(x.unsqueeze(0), sin, cos, None, None, False, False, False, x.shape[0])

    def _in_dtype(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The tables in the run dtype. All layers of a step bring the same ones: converted once."""
        seen = self._seen
        if (
            seen is None
            or self._tables is None
            or seen[0] is not cos
            or seen[1] is not sin
            or seen[2] != dtype
        ):
            self._seen = (cos, sin, dtype)
            self._tables = (cos.to(dtype).contiguous(), sin.to(dtype).contiguous())
        return self._tables


def _stand_together(q: Tensor, k: Tensor) -> bool:
    return (
        q.stride() == k.stride()
        and q.stride(-1) == 1
        and q.stride(-2) == q.shape[-1]
        and q.shape[0] > 0
        and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        and k.storage_offset() == q.storage_offset() + q.shape[1] * q.shape[2]
    )


def _joined(q: Tensor, k: Tensor) -> Tensor:
    return q.as_strided((q.shape[0], q.shape[1] + k.shape[1], q.shape[2]), q.stride(), q.storage_offset())


def _write_kv(ops: Ops, settings: Settings) -> Callable[..., Any]:
    return attention.KVWriter(ops.functions["reshape_paged_cache"])


def _paged_attention(ops: Ops, settings: Settings) -> Callable[..., Any]:
    return attention.PagedAttention(
        prefill=ops.functions["flash_attention"],
        decode=ops.functions["single_query_cached_kv_attn"],
        no_window=no_window(ops, settings),
        compute_dtype=_compute_dtype(settings),
    )


def _dense_attention(ops: Ops, settings: Settings) -> Callable[..., Any]:
    return attention.DenseAttention(
        ops.functions["flash_attention"],
        head_sizes=settings.head_sizes,
        compute_dtype=_compute_dtype(settings),
    )


def _compute_dtype(settings: Settings) -> torch.dtype:
    return torch.float16 if settings.half_softmax else torch.float32


_LOADERS: Mapping[OpName, Callable[[Ops, Settings], Callable[..., Any]]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "gated_act": _gated_act,
    "rotary": lambda ops, settings: Rotary(ops.functions["apply_rotary"], in_place=settings.rotary_in_place),
    "plan_attention": lambda ops, settings: attention.plan_attention,
    "write_kv": _write_kv,
    "paged_attention": _paged_attention,
    "dense_attention": _dense_attention,
    "prepare_linear": lambda ops, settings: linear.LinearPreparer(
        ops.functions["matmul"],
        fused_activation=settings.fused_activation,
        int8=ops.functions.get("weight_only_quant_matmul") if settings.weight_int8 else None,
    ),
}
