"""Attention by the compiled kernels, which read the cache where it is.

Numbers: docs/decisions/0080-cpu-native-attention.md.

The cache of a layer is one memory of blocks. A block has a part for each key/value head: its 16 keys as
[D, 16], so that sixteen scores are one vector, and behind them its values as [16, D].
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from opsin.api import AttentionBatch, KVGeometry, KVLayer
from opsin_device_cpu import native

BLOCK = 16
"""Tokens of a block: as many as the kernels compute at once."""

MAX_HEAD_SIZE = 1024

TYPES = {torch.float32: 0, torch.bfloat16: 1}

_BEYOND = 16
"""Elements behind the last block: the last vector of a row may reach over its end."""

_LIBRARY = native.library()
assert _LIBRARY is not None, native.loaded().reason
_PLAN, _PAGED = _LIBRARY.opsin_plan, _LIBRARY.opsin_paged
_DENSE, _ROTATE = _LIBRARY.opsin_dense, _LIBRARY.opsin_rotate

_ERRORS = {
    1: "the plan or the segments do not fit the tensors",
    2: "sizes that the kernels do not have",
    3: "the plan names blocks beyond the end of the cache",
    4: "not enough memory",
}


@dataclass(frozen=True, kw_only=True)
class BlocksKVLayer(KVLayer):
    """A cache layer as the compiled kernels read it.

    Attributes:
        memory: flat, all blocks and 16 elements more.
        address: of ``memory``.
        num_blocks: how many.
        heads: (K, D).
    """

    memory: Tensor
    address: int
    num_blocks: int
    heads: tuple[int, int]


def allocate_kv(
    num_blocks: int, block_size: int, geometry: KVGeometry, dtype: torch.dtype
) -> list[BlocksKVLayer]:
    """One `BlocksKVLayer` per model layer. The memory is not touched: the system hands it out on first use.

    Raises:
        ValueError: blocks are not of 16 tokens.
    """
    if block_size != BLOCK:
        raise ValueError(f"block_size={block_size}: the compiled kernels have blocks of {BLOCK} tokens")
    heads, size = geometry.num_kv_heads, geometry.head_size
    half = BLOCK * size
    layers = []
    for _ in range(geometry.num_layers):
        memory = torch.empty(num_blocks * heads * 2 * half + _BEYOND, dtype=dtype)
        parts = memory[:-_BEYOND].view(num_blocks, heads, 2 * half)
        k = parts.narrow(-1, 0, half).unflatten(-1, (size, BLOCK)).permute(0, 3, 1, 2)
        v = parts.narrow(-1, half, half).unflatten(-1, (BLOCK, size)).permute(0, 2, 1, 3)
        layers.append(
            BlocksKVLayer(
                k=k,
                v=v,
                memory=memory,
                address=memory.data_ptr(),
                num_blocks=num_blocks,
                heads=(heads, size),
            )
        )
    return layers


@dataclass(frozen=True)
class BlocksPlan:
    """A step's sequences, slots and blocks as the kernels read them (native/attention/attention.cc, `Plan`).

    Attributes:
        numbers: 64-bit integers.
        address: of ``numbers``.
        tokens: T.
    """

    numbers: array[int]
    address: int
    tokens: int


def plan_attention(batch: AttentionBatch) -> BlocksPlan:
    """`opsin.api.PlanAttention`."""
    if batch.block_size != BLOCK:
        raise ValueError(f"block_size={batch.block_size}: the compiled kernels have blocks of {BLOCK} tokens")
    at, begin = 0, 4 + 4 * len(batch.query_lens) + len(batch.slots)
    sequences: list[int] = []
    for query_len, length, table in zip(
        batch.query_lens, batch.context_lens, batch.block_tables, strict=True
    ):
        sequences += (at, query_len, length, begin)
        at += query_len
        begin += len(table)
    header = (len(batch.query_lens), len(batch.slots), 0, 0)
    numbers = array("q", [*header, *sequences, *batch.slots, *chain.from_iterable(batch.block_tables)])
    address, length = numbers.buffer_info()
    check(_PLAN(address, length), "plan_attention")
    return BlocksPlan(numbers, address, len(batch.slots))


def check(code: int, op: str) -> None:
    """Raises what a compiled kernel could not do.

    Raises:
        ValueError: sizes do not fit.
    """
    if code:
        raise ValueError(f"{op}: {_ERRORS[code]}")


def write_kv(k: Tensor, v: Tensor, layer: BlocksKVLayer, plan: BlocksPlan) -> None:
    """`opsin.api.WriteKV`."""
    _refuse_others(k, k, v, layer, plan)
    k, v = _heads(k), _heads(v)
    heads, size = layer.heads
    code = _PAGED(
        plan.address, None, 0, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), None, None, 0,
        layer.address, layer.num_blocks, None, heads, heads, size, 1.0, TYPES[k.dtype],
    )  # fmt: skip
    check(code, "write_kv")


def paged_attention(q: Tensor, layer: BlocksKVLayer, plan: BlocksPlan, scale: float) -> Tensor:
    """`opsin.api.PagedAttention`."""
    tokens, heads, size = q.shape
    if tokens != plan.tokens or size != layer.heads[1] or q.dtype is not layer.memory.dtype:
        raise ValueError(
            f"paged_attention: q {tuple(q.shape)} {q.dtype}; expected {plan.tokens} tokens, head size "
            f"{layer.heads[1]} and the cache's {layer.memory.dtype}"
        )
    q = _heads(q)
    out = q.new_empty(tokens, heads, size)
    code = _PAGED(
        plan.address, q.data_ptr(), q.stride(0), None, 0, None, 0, None, None, 0,
        layer.address, layer.num_blocks, out.data_ptr(), heads, layer.heads[0], size, scale, TYPES[q.dtype],
    )  # fmt: skip
    check(code, "paged_attention")
    return out


def rotary_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    layer: BlocksKVLayer,
    plan: BlocksPlan,
    scale: float,
) -> Tensor:
    """`opsin.api.RotaryPagedAttention`; rotates q in place."""
    _refuse_others(q, k, v, layer, plan)
    if cos.shape != sin.shape or len(cos) != plan.tokens or cos.dtype is not torch.float32:
        raise ValueError(
            f"rotary_paged_attention: cos {tuple(cos.shape)} {cos.dtype}, sin {tuple(sin.shape)}; expected "
            f"float32, one row for each of {plan.tokens} tokens"
        )
    tokens, heads, size = q.shape
    q, k, v, cos, sin = _heads(q), _heads(k), _heads(v), cos.contiguous(), sin.contiguous()
    out = q.new_empty(tokens, heads, size)
    code = _PAGED(
        plan.address, q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
        cos.data_ptr(), sin.data_ptr(), cos.shape[1],
        layer.address, layer.num_blocks, out.data_ptr(), heads, layer.heads[0], size, scale, TYPES[q.dtype],
    )  # fmt: skip
    check(code, "rotary_paged_attention")
    return out


def _refuse_others(q: Tensor, k: Tensor, v: Tensor, layer: BlocksKVLayer, plan: BlocksPlan) -> None:
    """What the kernels would read or write outside of tensors."""
    expected = (plan.tokens, *layer.heads)
    dtype = layer.memory.dtype
    if k.shape != expected or v.shape != expected or k.dtype is not dtype or v.dtype is not dtype:
        raise ValueError(
            f"k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}; expected {expected} {dtype}, by "
            "the step's plan and the cache"
        )
    if q.shape[0] != plan.tokens or q.shape[2] != expected[2] or q.dtype is not dtype:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}; expected tokens, head size and dtype of k {expected}"
        )


def _heads(x: Tensor) -> Tensor:
    """(T, heads, D), each row's heads one behind the other."""
    _, size, inner = x.stride()
    return x if inner == 1 and size == x.shape[2] else x.contiguous()


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Sequence[int],
    k_lens: Sequence[int] | None,
    scale: float,
) -> Tensor:
    """`opsin.api.DenseAttention`."""
    q, k, v = _heads(q), _heads(k), _heads(v)
    rows, heads, size = q.shape
    queries = array("q", q_lens)
    keys = queries if k_lens is None else array("q", k_lens)
    if len(keys) != len(queries) or k.shape != v.shape or k.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"dense_attention: q {tuple(q.shape)} in {len(queries)} segments, k {tuple(k.shape)} and v "
            f"{tuple(v.shape)} in {len(keys)}; expected equal heads and head sizes, and as many segments"
        )
    out = q.new_empty(rows, heads, size)
    code = _DENSE(
        q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), out.data_ptr(),
        len(queries), queries.buffer_info()[0], keys.buffer_info()[0], rows, len(k), heads, size, scale,
        TYPES[q.dtype],
    )  # fmt: skip
    check(code, "dense_attention")
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`opsin.api.Rotary`; in place where heads lie one behind the other."""
    q, k, cos, sin = _heads(q), _heads(k), cos.contiguous(), sin.contiguous()
    for x in (q, k):
        if cos.shape != sin.shape or len(cos) != len(x) or cos.dtype is not torch.float32:
            raise ValueError(
                f"rotary: cos {tuple(cos.shape)} {cos.dtype}, sin {tuple(sin.shape)}; expected float32, one "
                f"row for each of {len(x)} tokens"
            )
        rows, heads, size = x.shape
        code = _ROTATE(
            x.data_ptr(), x.stride(0), rows, heads, size, cos.data_ptr(), sin.data_ptr(), cos.shape[1],
            TYPES[x.dtype],
        )  # fmt: skip
        check(code, "rotary")
    return q, k
