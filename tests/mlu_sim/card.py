"""The simulated card: what it is, what it refuses, what it has allocated, which ops it ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

MAX_ELEMENTS = 2**31 - 1
"""The vendor skips its large-tensor tests on the 300 series."""


@dataclass
class Card:
    """One process's cards, all alike.

    Attributes:
        name, major, minor, isa_version: as ``torch.mlu.get_device_properties`` tells.
        total_memory: bytes of each device.
        num_devices: an MLU370-X8 is two.
        fault: what ``import torch_mlu`` raises, or None.
        allocated, peak: bytes, by device index.
        trace: how often each op ran: ``aten::mm``, ``tmo::flash_attention``.
        wide: aten ops that did arithmetic on int64 or float64 data, which the card does in 32 bits.
    """

    name: str = "MLU370-S4"
    major: int = 3
    minor: int = 7
    isa_version: int = 372
    total_memory: int = 24 * 2**30
    num_devices: int = 1
    fault: Exception | None = None
    allocated: Counter[int] = field(default_factory=Counter)
    peak: Counter[int] = field(default_factory=Counter)
    trace: Counter[str] = field(default_factory=Counter)
    wide: Counter[str] = field(default_factory=Counter)

    def allocate(self, index: int, num_bytes: int) -> None:
        """Count memory; raises `torch.OutOfMemoryError` beyond the card's."""
        wanted = self.allocated[index] + num_bytes
        if wanted > self.total_memory:
            free = self.total_memory - self.allocated[index]
            raise torch.OutOfMemoryError(
                f"MLU out of memory. Tried to allocate {num_bytes} bytes on mlu:{index}; {free} are free"
            )
        self.allocated[index] = wanted
        self.peak[index] = max(self.peak[index], wanted)

    def free(self, index: int, num_bytes: int) -> None:
        """The opposite of `allocate`."""
        self.allocated[index] -= num_bytes

    @contextmanager
    def recorded(self) -> Iterator[Counter[str]]:
        """The ops that run inside the block."""
        before = self.trace
        self.trace = Counter()
        try:
            yield self.trace
        finally:
            self.trace = before + self.trace

    @contextmanager
    def changed(self, **values: Any) -> Iterator[None]:
        """The card with other properties inside the block."""
        before = {name: getattr(self, name) for name in values}
        for name, value in values.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)


CARD = Card()
"""The card of this process."""
