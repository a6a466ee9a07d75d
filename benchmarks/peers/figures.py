"""From samples to figures: medians of the clean ones, with their spread."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peers.catalogue import WORKLOADS
from peers.turns import CLEAN, Turn


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One cell of the table.

    Attributes:
        values: of the samples that count: the clean ones, or all if there is none.
        num_taken: samples in all.
        clean: whether the values are of clean samples.
    """

    values: Sequence[float]
    num_taken: int
    clean: bool

    @property
    def median(self) -> float:
        """Of the values."""
        return statistics.median(self.values)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table.

    Attributes:
        key, title: for programs, for people.
        scale, digits: how seconds or bytes are shown.
        take: samples of a turn as (value, disturbance).
    """

    key: str
    title: str
    scale: float
    digits: int
    take: Callable[[Turn], list[tuple[float, float | None]]]


def _samples(workload: str, value: Callable[[dict[str, Any]], float]) -> Callable[[Turn], Any]:
    return lambda turn: [(value(s), s["disturbance"]) for s in turn.samples.get(workload, [])]


def inter_token_s(sample: dict[str, Any]) -> float:
    """Median time between two tokens of an answer."""
    times = sample["token_times"]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


COLUMNS = (
    Column(
        key="first_token_s",
        title="first token, s",
        scale=1,
        digits=2,
        take=_samples("latency", lambda s: float(s["token_times"][0])),
    ),
    Column(
        key="inter_token_s",
        title="inter-token, ms",
        scale=1e3,
        digits=1,
        take=_samples("latency", inter_token_s),
    ),
    *(
        Column(
            key=f"{workload.name}_s",
            title={
                "throughput": "16 requests, s",
                "shared": "8 questions, 1 picture, s",
                "system": "8 with a common system prompt, s",
            }[workload.name],
            scale=1,
            digits=1,
            take=_samples(workload.name, lambda s: float(s["seconds"])),
        )
        for workload in WORKLOADS
        if not workload.streamed
    ),
    Column(
        key="ready_s",
        title="ready, s",
        scale=1,
        digits=1,
        take=lambda turn: [(turn.usage["loading_s"], None)],
    ),
    Column(
        key="private_bytes",
        title="private GB after the runs",
        scale=1e-9,
        digits=1,
        take=lambda turn: [(turn.usage["private_bytes"], None)] if turn.usage["private_bytes"] else [],
    ),
)


def figure(column: Column, turns: Sequence[Turn]) -> Figure | None:
    """A row's figure; None if nothing was measured."""
    taken = [sample for turn in turns for sample in column.take(turn)]
    if not taken:
        return None
    clean = [value for value, disturbance in taken if disturbance is None or disturbance <= CLEAN]
    return Figure(values=clean or [value for value, _ in taken], num_taken=len(taken), clean=bool(clean))


def agreement(turns: Sequence[Turn], reference: Sequence[Turn]) -> float | None:
    """Share of the first request's tokens that come before a difference from another row's, same requests."""
    compared = equal = 0
    others = {turn.round: turn for turn in reference}
    for turn in turns:
        if turn.round not in others:
            continue
        for workload, samples in turn.samples.items():
            for mine, theirs in zip(samples, others[turn.round].samples.get(workload, [])):
                a, b = mine["first_ids"], theirs["first_ids"]
                compared += len(a)
                equal += next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
    return equal / compared if compared else None
