"""The contract of the ops between ranks. Threads stand for ranks, each with a link of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from opsin.api import KernelQuery, Parallel, RankLink
from opsin.kernels import Kernels

TIMEOUT_S = 60.0
ROUNDS = 3
"""Exchanges one after another: memory that ranks share is used again."""


@contextmanager
def places(world_size: int) -> Iterator[list[Parallel]]:
    """The places of ranks that are threads: with memory they share, and groups of gloo."""
    memory = os.memfd_create("opsin-exchanges") if hasattr(os, "memfd_create") else None
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # torch's stubs do not export it

    def place(rank: int) -> Parallel:
        limit = timedelta(seconds=TIMEOUT_S)
        group = torch.distributed.ProcessGroupGloo(store, rank, world_size, timeout=limit)
        link = RankLink(memory=memory, own_cores=False, check=lambda: None, timeout=TIMEOUT_S, group=group)
        return Parallel(rank=rank, world_size=world_size, link=link)

    try:
        with ThreadPoolExecutor(world_size) as pool:
            yield list(pool.map(place, range(world_size)))
    finally:
        if memory is not None:
            os.close(memory)


class _Bench(Protocol):
    """What a check needs of `opsin.testing.kernels.Bench`."""

    kernels: Kernels
    query: KernelQuery

    def draw(self, *shape: int) -> Tensor: ...

    def put(self, x: Tensor) -> Tensor: ...

    def compare(self, got: Tensor, expected: Tensor, what: str) -> None: ...


def exchange_cases(dtype: str) -> Iterator[tuple[str, KernelQuery, Callable[[_Bench], None]]]:
    """Name, query and check of each case: sums and concatenations, small and large."""
    for world, (rows, size) in product((2, 3), ((1, 896), (16, 896), (300, 896), (1, 7), (3, 700_000))):
        query = KernelQuery(op="all_reduce", dtype=dtype, size=size)
        check = partial(_check_sum, world=world, rows=rows, size=size)
        yield f"all_reduce-{dtype}-{world}x{rows}x{size}", query, check
    for world, (rows, size) in product((2, 3), ((1, 5003), (16, 5003), (40, 152_064))):
        query = KernelQuery(op="all_gather", dtype=dtype, size=size)
        check = partial(_check_gathered, world=world, rows=rows, size=size)
        yield f"all_gather-{dtype}-{world}x{rows}x{size}", query, check


def _check_sum(bench: _Bench, *, world: int, rows: int, size: int) -> None:
    """All ranks come to the sum, and to the same bits."""
    op = bench.kernels.all_reduce(bench.query)
    drawn = [[bench.draw(rows, size) for _ in range(world)] for _ in range(ROUNDS)]
    given = [[bench.put(part) for part in parts] for parts in drawn]

    def work(place: Parallel) -> list[Tensor]:
        return [op(parts[place.rank], place) for parts in given]

    found = _on_all(world, work)
    for number, parts in enumerate(drawn):
        for sums in found:
            bench.compare(sums[number], torch.stack(parts).sum(0), f"sum {number}")
            assert torch.equal(sums[number], found[0][number]), "ranks come to different bits"


def _check_gathered(bench: _Bench, *, world: int, rows: int, size: int) -> None:
    """All ranks come to the columns of all, whose parts differ in width."""
    op = bench.kernels.all_gather(bench.query)
    widths = Parallel(world_size=world).shares(size)
    drawn = [bench.draw(rows, size) for _ in range(ROUNDS)]
    given = [[bench.put(part) for part in whole.split(widths, 1)] for whole in drawn]

    def work(place: Parallel) -> list[Tensor]:
        return [op(parts[place.rank], widths, place) for parts in given]

    for wholes in _on_all(world, work):
        for number, whole in enumerate(wholes):
            bench.compare(whole, drawn[number], f"row {number}")


def _on_all(world: int, work: Callable[[Parallel], list[Tensor]]) -> Sequence[list[Tensor]]:
    with places(world) as all_places, ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, all_places))
