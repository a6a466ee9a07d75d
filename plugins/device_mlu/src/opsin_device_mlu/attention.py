"""Attention over torch_mlu_ops: paged for the decoder, dense for encoders.

A cache layer is [blocks, K, 16, D], D filled up to a head size the kernels take. What fills it up is zero in
queries, keys and values, so scores and the first D columns of the result are as without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.api import AttentionBatch, KVGeometry, KVLayer


def fitting(size: int, head_sizes: Sequence[int]) -> int | None:
    """The smallest head size the kernels take that holds ``size``; None if there is none."""
    return next((candidate for candidate in head_sizes if candidate >= size), None)


def kv_head_size(size: int, head_sizes: Sequence[int]) -> int:
    """What a head takes in the cache; one that no kernel takes is served by the reference, as it is."""
    return fitting(size, head_sizes) or size


def _fill_up(x: Tensor, size: int) -> Tensor:
    """x (..., D) -> contiguous (..., size)."""
    missing = size - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x.contiguous()


# --------------------------------------------------------------------------------------------------
# Paged
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HeadsFirstKVLayer(KVLayer):
    """A cache layer as this device keeps it.

    Attributes:
        keys, values: [blocks, K, block_size, filled-up D]; ``k`` and ``v`` are views of them.
    """

    keys: Tensor
    values: Tensor


def allocate_kv(
    num_blocks: int,
    block_size: int,
    geometry: KVGeometry,
    dtype: torch.dtype,
    *,
    device: str,
    head_sizes: Sequence[int],
) -> list[HeadsFirstKVLayer]:
    """One `HeadsFirstKVLayer` per model layer, zeroed: what fills heads up is never written."""
    size = kv_head_size(geometry.head_size, head_sizes)
    shape = (num_blocks, geometry.num_kv_heads, block_size, size)
    layers = []
    for _ in range(geometry.num_layers):
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        k, v = (x.transpose(1, 2)[..., : geometry.head_size] for x in (keys, values))
        layers.append(HeadsFirstKVLayer(k=k, v=v, keys=keys, values=values))
    return layers


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Consecutive sequences with one query each.

    Attributes:
        first, count: their queries in the flat batch.
        tables: int32 (count, blocks), filled up with 0.
        lengths: int32 (count,), tokens in the cache.
        longest: of them.
    """

    first: int
    count: int
    tables: Tensor
    lengths: Tensor
    longest: int


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Consecutive sequences with several queries each.

    Attributes:
        first, count: their queries in the flat batch.
        tables: int32 (sequences, blocks), filled up with 0.
        query_starts, context_starts: int32 (sequences + 1,), cumulated lengths.
        longest_query, longest_context: of them.
    """

    first: int
    count: int
    tables: Tensor
    query_starts: Tensor
    context_starts: Tensor
    longest_query: int
    longest_context: int


@dataclass(frozen=True)
class MluPlan:
    """What a step's attention needs, on the card: computed on the host, once per step.

    Attributes:
        slots: int32 (T,).
        parts: cover the T queries in order.
    """

    slots: Tensor
    parts: Sequence[Decode | Prefill]


def plan_attention(batch: AttentionBatch) -> MluPlan:
    """`opsin.api.PlanAttention`."""
    return MluPlan(_int32(batch.slots, batch.device), list(_parts(batch)))


def _parts(batch: AttentionBatch) -> Iterator[Decode | Prefill]:
    sequences = zip(batch.query_lens, batch.context_lens, batch.block_tables)
    first = 0
    for decoding, group in itertools.groupby(sequences, key=lambda sequence: sequence[0] == 1):
        queries, contexts, tables = zip(*group)
        count = sum(queries)
        blocks = -(-max(contexts) // batch.block_size)
        rows = [list(table[:blocks]) + [0] * (blocks - len(table)) for table in tables]
        table = _int32(rows, batch.device)
        if decoding:
            lengths = _int32(contexts, batch.device)
            yield Decode(first=first, count=count, tables=table, lengths=lengths, longest=max(contexts))
        else:
            yield Prefill(
                first=first,
                count=count,
                tables=table,
                query_starts=_starts(queries, batch.device),
                context_starts=_starts(contexts, batch.device),
                longest_query=max(queries),
                longest_context=max(contexts),
            )
        first += count


def _int32(values: Sequence[Any], device: str | torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device)


def _starts(lengths: Sequence[int], device: str | torch.device) -> Tensor:
    """0 and the cumulated lengths."""
    return _int32(list(itertools.accumulate(lengths, initial=0)), device)


class KVWriter:
    """`opsin.api.WriteKV`. ``function`` is ``reshape_paged_cache``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, k: Tensor, v: Tensor, layer: HeadsFirstKVLayer, plan: MluPlan) -> None:
        size = layer.keys.shape[-1]
        self._function(_fill_up(k, size), _fill_up(v, size), layer.keys, layer.values, plan.slots)


class PagedAttention:
    """`opsin.api.PagedAttention`: a mixed step is split into what decodes and what prefills.

    Args:
        prefill: ``flash_attention``, over block tables.
        decode: ``single_query_cached_kv_attn``.
        no_window: what tells ``decode`` that there is no window.
        compute_dtype: of ``prefill``'s softmax.
    """

    def __init__(
        self,
        *,
        prefill: Callable[..., Any],
        decode: Callable[..., Any],
        no_window: int,
        compute_dtype: torch.dtype,
    ) -> None:
        self._prefill_function, self._decode_function = prefill, decode
        self._no_window, self._compute_dtype = no_window, compute_dtype

    def __call__(self, q: Tensor, layer: HeadsFirstKVLayer, plan: MluPlan, scale: float) -> Tensor:
        size = q.shape[-1]
        q = _fill_up(q, layer.keys.shape[-1])
        out = torch.empty_like(q)
        for part in plan.parts:
            queries = q.narrow(0, part.first, part.count)
            results = out.narrow(0, part.first, part.count)
            if isinstance(part, Decode):
                self._decode(queries.unsqueeze(1), results.unsqueeze(1), layer, part, scale)
            else:
                self._prefill(queries, results, layer, part, scale)
        return out if size == out.shape[-1] else out[..., :size]

    def _decode(self, q: Tensor, out: Tensor, layer: HeadsFirstKVLayer, part: Decode, scale: float) -> None:
        self._decode_function(
            q,
            layer.keys,
            layer.values,
            out,
            part.tables,
            part.lengths,
            None,
            None,
            None,
            part.longest,
            self._no_window,
            self._no_window,
            scale,
        )

    def _prefill(self, q: Tensor, out: Tensor, layer: HeadsFirstKVLayer, part: Prefill, scale: float) -> None:
        self._prefill_function(
            q,
            layer.keys,
            layer.values,
            out,
            part.query_starts,
            part.context_starts,
            None,
            None,
            part.longest_query,
            part.longest_context,
            scale,
            True,
            -1,
            -1,
            self._compute_dtype,
            False,
            part.tables,
        )


# --------------------------------------------------------------------------------------------------
# Dense
# --------------------------------------------------------------------------------------------------


class DenseAttention:
    """`opsin.api.DenseAttention`.

    Args:
        function: ``flash_attention``.
        head_sizes: that it takes.
        compute_dtype: of its softmax.
    """

    def __init__(
        self, function: Callable[..., Any], *, head_sizes: Sequence[int], compute_dtype: torch.dtype
    ) -> None:
        self._function, self._head_sizes, self._compute_dtype = function, head_sizes, compute_dtype
        self._key: tuple[object, ...] = ()
        self._kept: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_lens: Sequence[int],
        k_lens: Sequence[int] | None,
        scale: float,
    ) -> Tensor:
        size = q.shape[-1]
        filled = fitting(size, self._head_sizes)
        assert filled is not None, "declined when the layer was bound"
        q, k, v = (_fill_up(x, filled) for x in (q, k, v))
        out = torch.empty_like(q)
        keys = q_lens if k_lens is None else k_lens
        query_starts, key_starts = self._starts(q_lens, keys, q.device)
        self._function(
            q,
            k,
            v,
            out,
            query_starts,
            key_starts,
            None,
            None,
            max(q_lens),
            max(keys),
            scale,
            False,
            -1,
            -1,
            self._compute_dtype,
            False,
            None,
        )
        return out if size == filled else out[..., :size]

    def _starts(
        self, q_lens: Sequence[int], k_lens: Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cumulated lengths. All layers of a tower bring the same ones: copied to the card once."""
        key = (tuple(q_lens), tuple(k_lens), device)
        if self._kept is None or key != self._key:
            queries = _starts(q_lens, device)
            keys = queries if k_lens is q_lens else _starts(k_lens, device)
            self._key, self._kept = key, (queries, keys)
        return self._kept
