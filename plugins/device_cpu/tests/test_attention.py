"""How a step's attention is planned, and what it may cost in memory."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opsin.api import AttentionBatch, KVGeometry
from opsin_device_cpu.attention import (
    GROUP_TOKENS,
    VIEW_MIN_TOKENS,
    Chunk,
    DecodeGroup,
    Gather,
    Run,
    allocate_kv,
    paged_attention,
    plan_attention,
)

SIZE = 16


def batch(lens: list[tuple[int, int]], tables: list[list[int]]) -> AttentionBatch:
    return AttentionBatch(
        query_lens=[query_len for query_len, _ in lens],
        context_lens=[length for _, length in lens],
        block_tables=tables,
        slots=[
            table[position // SIZE] * SIZE + position % SIZE
            for table, (query_len, length) in zip(tables, lens)
            for position in range(length - query_len, length)
        ],
        block_size=SIZE,
        device="cpu",
    )


def tables_for(lens: list[tuple[int, int]], *, step: int = 1) -> list[list[int]]:
    tables, first = [], 0
    for _, length in lens:
        count = -(-length // SIZE)
        tables.append([first + i * step for i in range(count)])
        first += count * step
    return tables


def test_consecutive_blocks_are_viewed_and_others_gathered() -> None:
    lens = [(1, 300), (20, 40)]
    parts = plan_attention(batch(lens, tables_for(lens))).parts
    assert [part.source for part in parts] == [Run(0, 300), Run(19 * SIZE, 40)]
    parts = plan_attention(batch(lens, tables_for(lens, step=2))).parts
    assert [type(part.source) for part in parts] == [Gather, Gather]


def test_padding_reads_the_sequences_own_slots() -> None:
    lens = [(1, 3), (1, 20)]
    (part,) = plan_attention(batch(lens, [[7], [4, 2]])).parts
    assert isinstance(part, DecodeGroup)
    assert isinstance(part.source, Gather)
    short, long = part.source.slots.view(2, 20).tolist()
    assert short == [112, 113, 114] + [114] * 17
    assert long == [*range(64, 80), *range(32, 36)]


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 700)).map(lambda pair: (pair[0], sum(pair)))
        | st.integers(1, 700).map(lambda length: (1, length)),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 2),
)
def test_parts_cover_the_step_in_order_within_the_group_limit(lens: list[tuple[int, int]], step: int) -> None:
    at, index = 0, 0
    for part in plan_attention(batch(lens, tables_for(lens, step=step))).parts:
        assert part.first == at
        if isinstance(part, Chunk):
            assert lens[index] == (part.count, part.past + part.count)
            index += 1
        else:
            members = lens[index : index + part.count]
            assert [query_len for query_len, _ in members] == [1] * part.count
            longest = max(length for _, length in members)
            assert part.count == 1 or part.count * longest <= GROUP_TOKENS
            if step == 1:
                assert part.count == 1 or longest < VIEW_MIN_TOKENS
            index += part.count
        at += part.count
    assert at == sum(query_len for query_len, _ in lens)
    assert index == len(lens)


def test_a_cache_takes_no_memory_before_it_is_used() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    geometry = KVGeometry(num_layers=4, num_kv_heads=2, head_size=64)
    layers = allocate_kv(16_384, SIZE, geometry, torch.float32)
    size = sum(layer.rows.nbytes for layer in layers)
    assert size == 2**30
    assert process.memory_info().rss - before < size / 10


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest memory that an operation makes, besides ``known``."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.num_bytes = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self.num_bytes = max(self.num_bytes, storage.nbytes())
        return result


@pytest.mark.parametrize("step", [1, -1], ids=["viewed", "gathered"])
def test_a_long_chunk_makes_nothing_of_size_query_times_context(step: int) -> None:
    queries, context = 512, 4096
    geometry = KVGeometry(num_layers=1, num_kv_heads=1, head_size=16)
    (layer,) = allocate_kv(context // SIZE, SIZE, geometry, torch.float32)
    layer.rows.normal_()
    lens = [(queries, context)]
    blocks = list(range(context // SIZE))[::step]
    q = torch.randn(queries, 2, 16)
    with LargestStorage(layer.rows) as largest:
        paged_attention(q, layer, plan_attention(batch(lens, [blocks])), 0.25)
    assert largest.num_bytes <= max(q.nbytes, layer.rows.nbytes)
    assert layer.rows.nbytes < queries * context  # a mask of bytes for one head
