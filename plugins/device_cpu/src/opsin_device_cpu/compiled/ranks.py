"""Sums and concatenations over ranks of one machine, through memory that their processes share.

Tens of microseconds where gloo's sockets take most of a millisecond: docs/decisions/0097-sums-over-ranks.md.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from ctypes import addressof, c_char
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from opsin.api import Parallel, RankLink
from opsin_device_cpu import native

_LIBRARY = native.library()
assert _LIBRARY is not None, native.loaded().reason
_SUM, _GATHER, _MISSING = _LIBRARY.opsin_ranks_sum, _LIBRARY.opsin_ranks_gather, _LIBRARY.opsin_ranks_missing
_SLOT_BYTES: int = _LIBRARY.opsin_ranks_slot_bytes()

_TYPES = {torch.float32: 0, torch.bfloat16: 1}

_SPINS = 20_000
"""How often a rank with cores of its own looks before it sleeps: about a millisecond."""

_LOOK_MS = 50
"""How long one wait lasts, after which it is seen whether the other ranks are still there."""


class _Area:
    """The memory of one group of ranks, and the number of the exchange that comes next."""

    def __init__(self, place: Parallel, link: RankLink, memory: int) -> None:
        assert _LIBRARY is not None
        size = _LIBRARY.opsin_ranks_bytes(place.world_size)
        os.ftruncate(memory, size)  # all ranks do: to the same size
        self._map = mmap.mmap(memory, size)
        self.address = addressof(c_char.from_buffer(self._map))
        self.link, self.world = link, place.world_size
        self.spins = _SPINS if link.own_cores else 0
        self._exchange = 0

    def exchange(self, run: Callable[[int, int], int]) -> None:
        """Do one exchange: ``run(number, posted)`` until all ranks have come.

        Raises:
            TimeoutError: a rank does not come. `RankLink.check` raises if one is gone.
        """
        self._exchange = (self._exchange + 1) & 0xFFFFFFFF
        code = run(self._exchange, 0)
        if code == 1:
            deadline = time.monotonic() + self.link.timeout
            while code == 1:
                self.link.check()
                if time.monotonic() > deadline:
                    missing = _MISSING(self.address, self.world, self._exchange)
                    raise TimeoutError(
                        f"rank {missing} has not come to a step for {self.link.timeout:g} s; it is stopped, "
                        "or too slow for tensor_parallel_timeout"
                    )
                code = run(self._exchange, 1)
        assert code == 0, f"an exchange between ranks was refused: {code}"


_areas: WeakKeyDictionary[RankLink, _Area] = WeakKeyDictionary()


def _area(place: Parallel) -> _Area | None:
    """None: these ranks share no memory."""
    link = place.link
    if link is None or link.memory is None:
        return None
    if link not in _areas:
        _areas[link] = _Area(place, link, link.memory)
    return _areas[link]


def all_reduce(x: Tensor, place: Parallel) -> Tensor:
    """`opsin.api.AllReduce`, written into x."""
    area = _area(place)
    if area is None:
        torch.distributed.all_reduce(x)
        return x
    x = x.contiguous()
    kind, rest = _TYPES[x.dtype], x.view(-1)
    for part in rest.split(_SLOT_BYTES // x.element_size()):
        area.exchange(
            lambda number, posted, part=part: _SUM(  # type: ignore[misc]
                area.address, area.world, place.rank, number, kind, part.data_ptr(), part.numel(), posted,
                area.spins, _LOOK_MS,
            )
        )  # fmt: skip
    return x


def all_gather(x: Tensor, widths: Sequence[int], place: Parallel) -> Tensor:
    """`opsin.api.AllGather`."""
    area, widest = _area(place), max(widths) * x.element_size()
    if area is None or widest > _SLOT_BYTES:
        padded = torch.nn.functional.pad(x, (0, max(widths) - x.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in widths]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
    out = x.new_empty(x.shape[0], sum(widths))
    sizes = torch.tensor([width * x.element_size() for width in widths], dtype=torch.int64)
    rows = max(1, _SLOT_BYTES // widest)
    for mine, whole in zip(x.contiguous().split(rows), out.split(rows)):
        area.exchange(
            lambda number, posted, mine=mine, whole=whole: _GATHER(  # type: ignore[misc]
                area.address, area.world, place.rank, number, mine.data_ptr(), len(mine), sizes.data_ptr(),
                whole.data_ptr(), posted, area.spins, _LOOK_MS,
            )
        )  # fmt: skip
    return out
