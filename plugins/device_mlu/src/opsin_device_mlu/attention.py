"""Attention over torch_mlu_ops: paged for the decoder, dense for encoders.

A cache layer is [blocks, K, 16, D], D filled up to a head size the kernels take. What fills it up is zero in
queries, keys and values, so scores and the first D columns of the result are as without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.api import AttentionBatch, KVGeometry, KVLayer

_LEAST_COLUMNS = 2
"""Of block tables: both kernels take a table of one column for "not paged" (manual 5.1.10, 5.1.34)."""

_ALIGNED = 16
"""Numbers of 4 bytes: each array of an upload begins at a multiple of 64 bytes."""


def fitting(size: int, head_sizes: Sequence[int]) -> int | None:
    """The smallest head size the kernels take that holds ``size``; None if there is none."""
    return next((candidate for candidate in head_sizes if candidate >= size), None)


def kv_head_size(size: int, head_sizes: Sequence[int]) -> int:
    """What a head takes in the cache; one that no kernel takes is served by the reference, as it is."""
    return fitting(size, head_sizes) or size


def _fill_up(x: Tensor, size: int, *, views: bool) -> Tensor:
    """x (T, heads, D) -> (T, heads, size): itself, if rows may be further apart than they are long."""
    missing = size - x.shape[-1]
    if missing:
        return F.pad(x, (0, missing))
    if views and x.stride(-1) == 1 and x.stride(-2) == size:
        return x
    return x.contiguous()


# --------------------------------------------------------------------------------------------------
# The cache and the plan of a step
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
        fresh: whether all that they see are the keys of this very step.
        tables: int32 (sequences, blocks), filled up with 0.
        query_starts, context_starts: int32 (sequences + 1,), cumulated lengths.
        longest_query, longest_context: of them.
    """

    first: int
    count: int
    fresh: bool
    tables: Tensor
    query_starts: Tensor
    context_starts: Tensor
    longest_query: int
    longest_context: int


@dataclass(kw_only=True)
class MluPlan:
    """What a step's attention needs, on the card: computed on the host, once per step.

    Attributes:
        slots: int32 (T,).
        parts: cover the T queries in order.
        written: the layer whose keys and values were written last, and those keys and values.
    """

    slots: Tensor
    parts: Sequence[Decode | Prefill]
    written: tuple[KVLayer, Tensor, Tensor] | None = field(default=None, repr=False)


def plan_attention(batch: AttentionBatch) -> MluPlan:
    """`opsin.api.PlanAttention`. Its numbers go to the card with all others of the step."""
    numbers = _Numbers()
    slots = numbers.add(batch.slots)
    drafts = list(_parts(batch, numbers))
    take = numbers.upload(batch)
    return MluPlan(slots=take(slots), parts=[draft(take) for draft in drafts])


_Place = tuple[int, tuple[int, ...]]
"""Where an array begins in an upload, and its shape."""
_Take = Callable[[_Place], Tensor]


class _Numbers:
    """Arrays of int32 on their way to the card."""

    def __init__(self) -> None:
        self._values: list[int] = []

    def add(self, values: Sequence[int]) -> _Place:
        return self._put(values, (len(values),))

    def add_rows(self, rows: Sequence[Sequence[int]], width: int) -> _Place:
        flat = [number for row in rows for number in (*row, *(0,) * (width - len(row)))]
        return self._put(flat, (len(rows), width))

    def _put(self, values: Sequence[int], shape: tuple[int, ...]) -> _Place:
        first = len(self._values)
        self._values.extend(values)
        self._values.extend([0] * (-len(self._values) % _ALIGNED))
        return first, shape

    def upload(self, batch: AttentionBatch) -> _Take:
        if batch.upload is not None:
            there = batch.upload(self._values)
        else:
            there = torch.tensor(self._values, dtype=torch.int32).to(batch.device)

        def take(place: _Place) -> Tensor:
            first, shape = place
            length = 1
            for size in shape:
                length *= size
            return there[first : first + length].view(shape)

        return take


def _parts(batch: AttentionBatch, numbers: _Numbers) -> Iterator[Callable[[_Take], Decode | Prefill]]:
    """What covers the batch, as soon as its numbers are on the card."""
    sequences = zip(batch.query_lens, batch.context_lens, batch.block_tables)
    first = 0
    for (decodes, fresh), group in itertools.groupby(sequences, key=lambda s: (s[0] == 1, s[0] == s[1])):
        queries, contexts, tables = zip(*group)
        count, longest = sum(queries), max(contexts)
        blocks = max(-(-longest // batch.block_size), _LEAST_COLUMNS)
        table = numbers.add_rows([table[:blocks] for table in tables], blocks)
        if decodes:
            yield _decode(first, count, table, numbers.add(contexts), longest)
        else:
            starts = numbers.add(_starts(queries))
            ends = starts if fresh else numbers.add(_starts(contexts))
            yield _prefill(first, count, fresh, table, starts, ends, max(queries), longest)
        first += count


def _decode(
    first: int, count: int, table: _Place, lengths: _Place, longest: int
) -> Callable[[_Take], Decode]:
    return lambda take: Decode(
        first=first, count=count, tables=take(table), lengths=take(lengths), longest=longest
    )


def _prefill(
    first: int,
    count: int,
    fresh: bool,
    table: _Place,
    query_starts: _Place,
    context_starts: _Place,
    longest_query: int,
    longest_context: int,
) -> Callable[[_Take], Prefill]:
    return lambda take: Prefill(
        first=first,
        count=count,
        fresh=fresh,
        tables=take(table),
        query_starts=take(query_starts),
        context_starts=take(context_starts),
        longest_query=longest_query,
        longest_context=longest_context,
    )


def _starts(lengths: Sequence[int]) -> list[int]:
    """0 and the cumulated lengths."""
    return list(itertools.accumulate(lengths, initial=0))


# --------------------------------------------------------------------------------------------------
# Paged
# --------------------------------------------------------------------------------------------------


class KVWriter:
    """`opsin.api.WriteKV`.

    Args:
        call: ``reshape_paged_cache``.
        views: whether it takes rows that are further apart than they are long.
    """

    def __init__(self, call: Callable[..., Any], *, views: bool) -> None:
        self._call, self.views = call, views

    def __call__(self, k: Tensor, v: Tensor, layer: HeadsFirstKVLayer, plan: MluPlan) -> None:
        size = layer.keys.shape[-1]
        k, v = (_fill_up(x, size, views=self.views) for x in (k, v))
        self._call(k=k, v=v, k_cache=layer.keys, v_cache=layer.values, slot_mapping=plan.slots)
        plan.written = (layer, k, v)


class PagedAttention:
    """`opsin.api.PagedAttention`: a mixed step is split into what decodes and what prefills.

    Args:
        prefill: ``flash_attention``.
        decode: ``single_query_cached_kv_attn``.
        window: what tells ``decode`` that there is no window.
        packed: whether fresh prompts take the keys and values that were written last, as they are, rather
            than through block tables.
        views: whether queries may have rows that are further apart than they are long.
        compute_dtype: of ``prefill``'s softmax.
    """

    def __init__(
        self,
        *,
        prefill: Callable[..., Any],
        decode: Callable[..., Any],
        window: int,
        packed: bool,
        views: bool,
        compute_dtype: torch.dtype,
    ) -> None:
        self.prefill, self._decode_call = prefill, decode
        self.window, self.packed, self.views, self._compute_dtype = window, packed, views, compute_dtype

    def __call__(self, q: Tensor, layer: HeadsFirstKVLayer, plan: MluPlan, scale: float) -> Tensor:
        size, filled = q.shape[-1], layer.keys.shape[-1]
        q = _fill_up(q, filled, views=self.views)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for part in plan.parts:
            queries = q.narrow(0, part.first, part.count)
            results = out.narrow(0, part.first, part.count)
            if isinstance(part, Decode):
                self._decode(queries.unsqueeze(1), results.unsqueeze(1), layer, part, scale)
            elif part.fresh and self.packed and plan.written is not None and plan.written[0] is layer:
                k, v = (x.narrow(0, part.first, part.count) for x in plan.written[1:])
                if not self.views:
                    k, v = k.contiguous(), v.contiguous()
                self._prefill(queries, k, v, results, None, part, scale)
            else:
                self._prefill(queries, layer.keys, layer.values, results, part.tables, part, scale)
        return out if size == filled else out[..., :size]

    def _decode(self, q: Tensor, out: Tensor, layer: HeadsFirstKVLayer, part: Decode, scale: float) -> None:
        self._decode_call(
            q=q,
            k_cache=layer.keys,
            v_cache=layer.values,
            out=out,
            block_tables=part.tables,
            context_lens=part.lengths,
            k_cache_quant_scale=None,
            v_cache_quant_scale=None,
            alibi_slopes=None,
            max_context_len=part.longest,
            windows_size_left=self.window,
            windows_size_right=self.window,
            softmax_scale=scale,
        )

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, tables: Tensor | None, part: Prefill, scale: float
    ) -> None:
        self.prefill(
            q=q,
            k=k,
            v=v,
            out=out,
            cu_seq_lens_q=part.query_starts,
            cu_seq_lens_kv=part.context_starts,
            alibi_slope=None,
            attn_bias=None,
            max_seq_len_q=part.longest_query,
            max_seq_len_kv=part.longest_context,
            softmax_scale=scale,
            is_causal=True,
            window_size_left=-1,
            window_size_right=-1,
            compute_dtype=self._compute_dtype,
            return_lse=False,
            block_tables=tables,
        )


# --------------------------------------------------------------------------------------------------
# Dense
# --------------------------------------------------------------------------------------------------


class DenseAttention:
    """`opsin.api.DenseAttention`.

    Args:
        call: ``flash_attention``.
        head_sizes: that it takes.
        views: whether it takes rows that are further apart than they are long.
        compute_dtype: of its softmax.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        *,
        head_sizes: Sequence[int],
        views: bool,
        compute_dtype: torch.dtype,
    ) -> None:
        self._call, self._head_sizes, self.views = call, head_sizes, views
        self._compute_dtype = compute_dtype
        self._key: tuple[object, ...] = ()
        self._kept: tuple[Tensor, Tensor] | None = None

    def fresh(self) -> DenseAttention:
        """The same for another model: what is kept of a tower is kept apart."""
        return DenseAttention(
            self._call, head_sizes=self._head_sizes, views=self.views, compute_dtype=self._compute_dtype
        )

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
        q, k, v = (_fill_up(x, filled, views=self.views) for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        keys = q_lens if k_lens is None else k_lens
        query_starts, key_starts = self._starts(q_lens, keys, q.device)
        self._call(
            q=q,
            k=k,
            v=v,
            out=out,
            cu_seq_lens_q=query_starts,
            cu_seq_lens_kv=key_starts,
            alibi_slope=None,
            attn_bias=None,
            max_seq_len_q=max(q_lens),
            max_seq_len_kv=max(keys),
            softmax_scale=scale,
            is_causal=False,
            window_size_left=-1,
            window_size_right=-1,
            compute_dtype=self._compute_dtype,
            return_lse=False,
            block_tables=None,
        )
        return out if size == filled else out[..., :size]

    def _starts(
        self, q_lens: Sequence[int], k_lens: Sequence[int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cumulated lengths. All layers of a tower bring the same ones: copied to the card once."""
        key = (tuple(q_lens), tuple(k_lens), device)
        if self._kept is None or key != self._key:
            queries = _int32(_starts(q_lens), device)
            keys = queries if k_lens is q_lens else _int32(_starts(k_lens), device)
            self._key, self._kept = key, (queries, keys)
        return self._kept


def _int32(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device)
