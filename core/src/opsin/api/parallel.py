"""Tensor parallelism: the place of a process among the ranks, and its part of each dimension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(kw_only=True, eq=False)
class RankLink:
    """What the ranks of one machine have to reach each other. Since 1.2.

    Attributes:
        memory: file descriptor of memory that all ranks can map, empty at first; None: there is none.
        own_cores: whether each rank has cores of its own, so that waiting may spin.
        check: raises `opsin.errors.DeviceLostError` if a rank is gone. To be called while waiting.
        timeout: seconds after which a rank that does not come counts as lost.
        group: their ``torch.distributed`` process group, over the device's backend, once the device is open;
            None before, and where that is the default group.
    """

    memory: int | None
    own_cores: bool
    check: Callable[[], None]
    timeout: float
    group: Any = None


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This process's place among the tensor-parallel ranks.

    Attributes:
        rank: 0 is the engine's own process.
        world_size: how many ranks there are.
        link: how ranks reach each other; None for one rank, or over torch.distributed's default group. Since
            1.2.
    """

    rank: int = 0
    world_size: int = 1
    link: RankLink | None = None

    def share(self, total: int, unit: int = 1) -> tuple[int, int]:
        """Where this rank's part of a dimension begins, and how long it is. Since 1.2.

        Parts are made of whole units, the numbers of which differ by 1 at most. Where there are fewer units
        than ranks, neighbouring ranks have the same one.

        Raises:
            ValueError: the unit does not divide the dimension.
        """
        if total % unit:
            raise ValueError(f"units of {unit} do not divide {total}")
        units = total // unit
        first = self.rank * units // self.world_size
        last = max((self.rank + 1) * units // self.world_size, first + 1)
        return first * unit, (last - first) * unit

    def shares(self, total: int, unit: int = 1) -> list[int]:
        """How long the part of each rank is. Since 1.2."""
        ranks = (replace(self, rank=rank) for rank in range(self.world_size))
        return [place.share(total, unit)[1] for place in ranks]
