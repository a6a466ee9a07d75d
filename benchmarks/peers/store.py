"""What has been measured, kept on disk after every turn, so that a run can be stopped and go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from floors import Floors

from peers.environments import ROOT
from peers.turns import Turn


@dataclass
class Store:
    """Turns and floors of one machine.

    Attributes:
        path: the file.
        key: what must be equal for figures to be comparable: processor, threads, size of the workloads.
        turns: so far.
        floors: per dtype, measured so far, as dicts of `Floors`.
        refused: rows that cannot run, and why.
        sources: digest of opsin's code, for each of its turns.
    """

    path: Path
    key: Mapping[str, Any]
    turns: list[Turn] = field(default_factory=list)
    floors: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path, key: Mapping[str, Any], *, fresh: bool) -> Store:
        """What the file has, or nothing if its key is another or ``fresh`` asks for nothing."""
        store = cls(path, key)
        if path.exists() and not fresh:
            content = json.loads(path.read_text())
            if content["key"] == key:
                store.turns = [Turn(**turn) for turn in content["turns"]]
                store.floors = content["floors"]
                store.sources = content["sources"]
        return store

    def drop_other_versions(self, row: str, digest: str) -> None:
        """Forget a row's turns if they were taken with other code."""
        if self.sources.get(row, digest) != digest:
            self.turns = [turn for turn in self.turns if turn.row != row]
        self.sources[row] = digest

    def has(self, row: str, number: int, workload: str) -> bool:
        """Whether this was measured."""
        return any(t.row == row and t.round == number and workload in t.samples for t in self.turns)

    def add(self, turn: Turn) -> None:
        """Keep a turn, with what an earlier one of the same row and round measured besides."""
        for old in [t for t in self.turns if (t.row, t.round) == (turn.row, turn.round)]:
            turn.samples = {**old.samples, **turn.samples}
            self.turns.remove(old)
        self.turns.append(turn)
        self.save()

    def add_floors(self, dtype: str, measured: Floors) -> None:
        """Keep a measurement of the machine."""
        self.floors.setdefault(dtype, []).append(asdict(measured))
        self.save()

    def save(self) -> None:
        """Write the file: aside first, so that an interruption leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        content = {
            "key": self.key,
            "turns": [asdict(turn) for turn in self.turns],
            "floors": self.floors,
            "sources": self.sources,
        }
        partial.write_text(json.dumps(content))
        partial.rename(self.path)


_APART = {"tests", "bench", "cli", "server", "testing"}
"""Folders whose code no measured call runs."""


def sources_digest() -> str:
    """Of the code that `opsin.LLM` runs: figures of other code are no longer those of this one."""
    digest = hashlib.sha256()
    for folder in ("core/src", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("plugins/*")))):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".cc", ".h") and not _APART.intersection(file.parts):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
