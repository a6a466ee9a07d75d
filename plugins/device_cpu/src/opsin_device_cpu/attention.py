"""Attention: paged for the decoder, dense for encoders. Numbers: docs/decisions/0021-cpu-attention.md.

The cache of a layer is one tensor of rows, a row per token slot: [slots, 2, K, D], key and value side by
side. One gather fetches both, and where a sequence's blocks lie one after another a view does, without one.
Nothing of size query x context is ever made: torch's fused CPU kernel works in tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.api import AttentionBatch, KVGeometry, KVLayer

GROUP_TOKENS = 1024
"""Short decoding sequences are gathered and padded together up to this many tokens: fewer calls, and the
gathered rows are still in the L2 cache when they are used."""

MASK_ELEMENTS = 2**16
"""Up to this many query x key pairs a mask is cheaper than attending to past and present apart."""

VIEW_MIN_TOKENS = 256
"""From this context length on a sequence that needs no gather is cheaper alone than in a padded group."""


@dataclass(frozen=True, kw_only=True)
class RowsKVLayer(KVLayer):
    """A cache layer as this device keeps it.

    Attributes:
        rows: [slots, 2, K, D].
        keys, values: [slots, K, D], views of ``rows``.
    """

    rows: Tensor
    keys: Tensor
    values: Tensor


def allocate_kv(
    num_blocks: int, block_size: int, geometry: KVGeometry, dtype: torch.dtype
) -> list[RowsKVLayer]:
    """One `RowsKVLayer` per model layer. The memory is not touched: the system hands it out on first use."""
    layers = []
    for _ in range(geometry.num_layers):
        rows = torch.empty(num_blocks * block_size, 2, geometry.num_kv_heads, geometry.head_size, dtype=dtype)
        keys, values = rows.unbind(1)
        paged = rows.unflatten(0, (num_blocks, block_size))
        layers.append(
            RowsKVLayer(k=paged.select(2, 0), v=paged.select(2, 1), rows=rows, keys=keys, values=values)
        )
    return layers


@dataclass(frozen=True)
class Run:
    """Consecutive slots: the rows of a sequence whose blocks lie one after another."""

    first: int
    count: int

    def rows(self, layer: RowsKVLayer) -> Tensor:
        """[count, 2, K, D], a view."""
        return layer.rows.narrow(0, self.first, self.count)


@dataclass(frozen=True)
class Gather:
    """Slots anywhere, int64 (count,)."""

    slots: Tensor

    def rows(self, layer: RowsKVLayer) -> Tensor:
        """[count, 2, K, D], a copy."""
        return layer.rows.index_select(0, self.slots)


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences with one query each, their contexts padded to one length.

    Attributes:
        first, count: its queries in the flat batch.
        source: slots, ``count * length`` of them. Padding repeats a slot of the same sequence, so that
            what is masked is finite and its own.
        mask: float32 [count, 1, 1, length], 0 or -inf; None if nothing is padded.
    """

    first: int
    count: int
    source: Run | Gather
    mask: Tensor | None


@dataclass(frozen=True)
class Chunk:
    """Several queries of one sequence.

    Attributes:
        first, count: its queries in the flat batch.
        past: context tokens before them.
        source: slots of the whole context.
        mask: float32 [count, past + count], 0 or -inf; None: nothing is past, or the mask would be large.
    """

    first: int
    count: int
    past: int
    source: Run | Gather
    mask: Tensor | None


@dataclass(frozen=True)
class CpuPlan:
    """What a step's attention needs, computed once.

    Attributes:
        slots: int64 (T,), where the step's keys and values go.
        parts: covers the T queries in order.
    """

    slots: Tensor
    parts: Sequence[DecodeGroup | Chunk]


def plan_attention(batch: AttentionBatch) -> CpuPlan:
    """`opsin.api.PlanAttention`."""
    slots = torch.tensor(batch.slots, dtype=torch.int64)
    return CpuPlan(slots, list(_parts(batch)))


def _parts(batch: AttentionBatch) -> Iterator[DecodeGroup | Chunk]:
    size = batch.block_size
    waiting: list[_Context] = []
    at = 0
    for table, query_len, length in zip(batch.block_tables, batch.query_lens, batch.context_lens):
        context = _Context(list(table[: -(-length // size)]), length)
        run = context.run(size)
        alone = query_len > 1 or (run is not None and length >= VIEW_MIN_TOKENS)
        longest = max([length, *(other.length for other in waiting)])
        if waiting and (alone or longest * (len(waiting) + 1) > GROUP_TOKENS):
            yield _group(at - len(waiting), waiting, size)
            waiting = []
        if query_len > 1:
            source = run or _gather([context], length, size)
            yield Chunk(at, query_len, length - query_len, source, _chunk_mask(query_len, length))
        elif alone:
            yield _group(at, [context], size)
        else:
            waiting.append(context)
        at += query_len
    if waiting:
        yield _group(at - len(waiting), waiting, size)


@dataclass(frozen=True)
class _Context:
    """Where one sequence's context lies: just enough block ids for its length."""

    blocks: list[int]
    length: int

    def run(self, block_size: int) -> Run | None:
        first = self.blocks[0]
        if self.blocks != list(range(first, first + len(self.blocks))):
            return None
        return Run(first * block_size, self.length)


def _group(first: int, contexts: Sequence[_Context], size: int) -> DecodeGroup:
    if len(contexts) == 1:
        (context,) = contexts
        source = context.run(size) or _gather(contexts, context.length, size)
        return DecodeGroup(first, 1, source, None)
    longest = max(context.length for context in contexts)
    mask = None
    if any(context.length < longest for context in contexts):
        lengths = torch.tensor([context.length for context in contexts]).view(-1, 1, 1, 1)
        mask = torch.zeros(len(contexts), 1, 1, longest)
        mask.masked_fill_(torch.arange(longest) >= lengths, float("-inf"))
    return DecodeGroup(first, len(contexts), _gather(contexts, longest, size), mask)


def _chunk_mask(count: int, length: int) -> Tensor | None:
    """Bottom-right causal."""
    if count == length or count * length > MASK_ELEMENTS:
        return None
    return torch.full((count, length), float("-inf")).triu_(length - count + 1)


def _gather(contexts: Sequence[_Context], length: int, size: int) -> Gather:
    """Slots of each context, padded to ``length`` with its last slot, one context after another."""
    num_blocks = -(-length // size)
    tables = torch.tensor([c.blocks + [0] * (num_blocks - len(c.blocks)) for c in contexts])
    last = torch.tensor([[c.length - 1] for c in contexts])
    token = torch.arange(length).expand(len(contexts), -1).minimum(last)
    slots = tables.gather(1, token // size) * size + token % size
    return Gather(slots.flatten())


def write_kv(k: Tensor, v: Tensor, layer: RowsKVLayer, plan: CpuPlan) -> None:
    """`opsin.api.WriteKV`."""
    layer.keys.index_copy_(0, plan.slots, k)
    layer.values.index_copy_(0, plan.slots, v)


def paged_attention(q: Tensor, layer: RowsKVLayer, plan: CpuPlan, scale: float) -> Tensor:
    """`opsin.api.PagedAttention`."""
    grouped = q.unflatten(1, (layer.rows.shape[2], -1))  # (T, K, N / K, D)
    outputs = [
        _decode(grouped, layer, part, scale)
        if isinstance(part, DecodeGroup)
        else _chunk(grouped, layer, part, scale)
        for part in plan.parts
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _decode(q: Tensor, layer: RowsKVLayer, part: DecodeGroup, scale: float) -> Tensor:
    """(count, N, D). The query heads that share a key head stand as its query rows: nothing is repeated."""
    rows = part.source.rows(layer)
    k, v = rows.unflatten(0, (part.count, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (count, K, length, D)
    mask = None if part.mask is None else part.mask.to(q.dtype)
    q = q.narrow(0, part.first, part.count)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).flatten(1, 2)


def _chunk(q: Tensor, layer: RowsKVLayer, part: Chunk, scale: float) -> Tensor:
    """(count, N, D). Key heads are the kernel's batch, their query heads its heads; keys are only viewed."""
    q = q.narrow(0, part.first, part.count).permute(1, 2, 0, 3)  # (K, N / K, count, D)
    both = part.source.rows(layer).permute(1, 2, 0, 3).unsqueeze(2)  # (2, K, 1, context, D)
    k, v = both.expand(-1, -1, q.shape[1], -1, -1).unbind(0)
    if part.past == 0:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    elif part.mask is not None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=part.mask.to(q.dtype), scale=scale)
    else:
        out = _past_and_present(q, k, v, part.past, scale)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def _past_and_present(q: Tensor, k: Tensor, v: Tensor, past: int, scale: float) -> Tensor:
    """Bottom-right causal attention without a mask.

    The kernel's causal mask is top-left aligned, so the keys before the chunk (which every query sees) and
    the chunk's own (a square) are attended to apart and weighted by their softmax denominators, as in
    Milakov & Gimelshein 2018, section 3.1.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    (k_old, k_new), (v_old, v_new) = (x.split([past, x.shape[2] - past], dim=2) for x in (k, v))
    old, old_log = flash(q, k_old, v_old, scale=scale)
    new, new_log = flash(q, k_new, v_new, 0.0, True, scale=scale)
    share = torch.sigmoid(old_log - new_log).unsqueeze(-1)  # of the old keys, float32
    out: Tensor = torch.lerp(new.float(), old.float(), share).to(q.dtype)
    return out


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Sequence[int],
    k_lens: Sequence[int] | None,
    scale: float,
) -> Tensor:
    """`opsin.api.DenseAttention`: neighbouring segments of equal lengths go through the kernel together."""
    pairs = list(zip(q_lens, q_lens if k_lens is None else k_lens))
    outputs: list[Tensor] = []
    q_at = k_at = 0
    for (q_len, k_len), equal in itertools.groupby(pairs):
        count = len(list(equal))
        queries = _segments(q, q_at, count, q_len)
        keys, values = _segments(k, k_at, count, k_len), _segments(v, k_at, count, k_len)
        out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        q_at, k_at = q_at + count * q_len, k_at + count * k_len
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _segments(x: Tensor, first: int, count: int, length: int) -> Tensor:
    """(count, N, length, D), a view."""
    segments: Tensor = x.narrow(0, first, count * length).unflatten(0, (count, length))
    return segments.transpose(1, 2)
