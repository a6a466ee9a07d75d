"""Sums and concatenations over ranks of one machine, through memory that their processes share.

Tens of microseconds where gloo's sockets take most of a millisecond: docs/decisions/0014-sums-over-ranks.md.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from ctypes import addressof, c_char
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from opsin.api import Parallel, RankLink
from opsin_device_cpu import native

_LIBRARY = native.library()
assert _LIBRARY is not None, native.loaded().reason
_SUM, _GATHER, _MISSING = _LIBRARY.opsin_ranks_sum, _LIBRARY.opsin_ranks_gather, _LIBRARY.opsin_ranks_missing
_SLOT_BYTES: int = _LIBRARY.opsin_ranks_slot_bytes()

_SUM_BYTES = 256 * 1024
"""Summed at once: as much as stays in a core's cache between writing and reading (206 us for 300 x 896
floats, 542 us in one piece)."""

_TYPES = {torch.float32: 0, torch.bfloat16: 1}

_SPINS = 20_000
"""How often a rank with cores of its own looks before it sleeps: about a millisecond."""

_LOOK_MS = 50
"""How long one wait lasts, after which it is seen whether the other ranks are still there."""


class _Area:
    """The memory of one group of ranks, and the number of the exchange that comes next."""

    def __init__(self, world_size: int, memory: int) -> None:
        assert _LIBRARY is not None
        size = _LIBRARY.opsin_ranks_bytes(world_size)
        os.ftruncate(memory, size)  # all ranks do: to the same size
        self._map = mmap.mmap(memory, size)
        self.address = addressof(c_char.from_buffer(self._map))
        self.exchange = 0


_areas: WeakKeyDictionary[RankLink, _Area] = WeakKeyDictionary()


def _exchange(place: Parallel, op: Callable[..., int], *arguments: int | None) -> None:
    """Do one exchange, once all ranks have come to it.

    Raises:
        TimeoutError: a rank does not come. `RankLink.check` raises if one is gone.
    """
    link, world = place.link, place.world_size
    if link is None or link.memory is None:
        raise ValueError("ranks on the CPU share memory; expected Parallel.link with memory")
    area = _areas.get(link)
    if area is None:
        area = _areas[link] = _Area(world, link.memory)
    area.exchange = number = (area.exchange + 1) & 0xFFFFFFFF
    run = partial(op, area.address, world, place.rank, number, *arguments)
    spins = _SPINS if link.own_cores else 0
    code = run(0, spins, _LOOK_MS)
    if code == 1:
        deadline = time.monotonic() + link.timeout
        while code == 1:
            link.check()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {_MISSING(area.address, world, number)} has not come to a step for "
                    f"{link.timeout:g} s; it is stopped, or too slow for tensor_parallel_timeout"
                )
            code = run(1, spins, _LOOK_MS)
    assert code == 0, f"an exchange between ranks was refused: {code}"


def all_reduce(x: Tensor, place: Parallel) -> Tensor:
    """`opsin.api.AllReduce`, written into x."""
    x = x.contiguous()
    for part in x.view(-1).split(_SUM_BYTES // x.element_size()):
        _exchange(place, _SUM, _TYPES[x.dtype], part.data_ptr(), part.numel())
    return x


def all_gather(x: Tensor, widths: Sequence[int], place: Parallel) -> Tensor:
    """`opsin.api.AllGather`.

    Raises:
        ValueError: a row is wider than what ranks exchange at once.
    """
    widest = max(widths) * x.element_size()
    if widest > _SLOT_BYTES:
        raise ValueError(f"rows of {widest} bytes; at most {_SLOT_BYTES} are gathered")
    out = x.new_empty(x.shape[0], sum(widths))
    sizes = torch.tensor([width * x.element_size() for width in widths], dtype=torch.int64)
    rows = _SLOT_BYTES // widest
    for mine, whole in zip(x.contiguous().split(rows), out.split(rows)):
        _exchange(place, _GATHER, mine.data_ptr(), len(mine), sizes.data_ptr(), whole.data_ptr())
    return out
