"""Which cores each rank of one machine gets: whole cores, of as few NUMA nodes as can be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The cores of one rank.

    Attributes:
        cpus: numbers of its hardware threads; empty where the system does not tell.
        nodes: the NUMA nodes these belong to.
        alone: whether no other rank has one of them.
    """

    cpus: frozenset[int]
    nodes: tuple[int, ...]
    alone: bool

    def __str__(self) -> str:
        """E.g. ``"cores 0, 1 of NUMA node 0"``."""
        if not self.cpus:
            return "wherever the system puts it"
        cores = f"core{'s' * (len(self.cpus) > 1)} {', '.join(map(str, sorted(self.cpus)))}"
        shared = "" if self.alone else ", shared with other ranks"
        return f"{cores} of NUMA node {', '.join(map(str, self.nodes))}{shared}"


def place_ranks(world_size: int) -> list[Placement]:
    """Divide the cores that this process may use among ranks.

    With fewer cores than ranks, several ranks have the same one.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    if affinity is None:
        return [Placement(cpus=frozenset(), nodes=(), alone=False)] * world_size
    cpus = sorted(affinity(0))
    return divide({cpu: _node_of(cpu) for cpu in cpus}, [_siblings(cpu) for cpu in cpus], world_size)


def divide(node_of: dict[int, int], siblings: Sequence[frozenset[int]], world_size: int) -> list[Placement]:
    """`place_ranks` without the operating system.

    Args:
        node_of: usable hardware thread -> its NUMA node.
        siblings: for each of them, the hardware threads of the same core.
        world_size: ranks.
    """
    cores = sorted(
        {frozenset(group & node_of.keys()) for group in siblings},
        key=lambda core: (node_of[min(core)], min(core)),
    )
    alone = len(cores) >= world_size
    placed = []
    for rank in range(world_size):
        first, last = rank * len(cores) // world_size, (rank + 1) * len(cores) // world_size
        mine = cores[first:last] if alone else [cores[rank % len(cores)]]
        cpus = frozenset[int]().union(*mine)
        placed.append(Placement(cpus=cpus, nodes=tuple(sorted({node_of[cpu] for cpu in cpus})), alone=alone))
    return placed


def _siblings(cpu: int) -> frozenset[int]:
    listed = _read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list")
    return frozenset(_numbers(listed)) | {cpu}


def _node_of(cpu: int) -> int:
    nodes = _NODES.glob("node[0-9]*/cpulist") if _NODES.exists() else ()
    found = (int(path.parent.name.removeprefix("node")) for path in nodes if cpu in _numbers(_read(path)))
    return next(found, 0)


def _numbers(listed: str) -> set[int]:
    """``"0-2,5"`` -> {0, 1, 2, 5}."""
    numbers: set[int] = set()
    for part in filter(None, listed.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
