"""`ByteLRU`: a least-recently-used map under a byte budget, with pins. Holds media, mapped and encoded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")


@dataclass
class _Entry(Generic[V]):
    value: V
    num_bytes: int
    pins: int = 0


class ByteLRU(Generic[V]):
    """A map that forgets what was unused longest once its values exceed ``max_bytes``. Thread-safe.

    A pinned entry is never evicted; pins count, so that several requests can hold one entry.

    Attributes:
        max_bytes: the budget.
        queries, hits: how often `get` was called, and found something.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.queries = 0
        self.hits = 0
        self._entries: OrderedDict[str, _Entry[V]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> V | None:
        """The value, now the most recently used; None if it is not there."""
        with self._lock:
            self.queries += 1
            entry = self._entries.get(key)
            if entry is None:
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return entry.value

    def put(self, key: str, value: V, num_bytes: int, *, pin: bool = False) -> bool:
        """Store a value, evicting unpinned ones, oldest first, to make room.

        Args:
            key: an entry under the same key is replaced and keeps its pins.
            value: what to store.
            num_bytes: what it counts for.
            pin: pin it in the same step, so that nothing can evict it in between.

        Returns:
            Whether it was stored. Without room for it, nothing is evicted and nothing changes.
        """
        with self._lock:
            old = self._entries.get(key)
            excess = self._num_bytes - (old.num_bytes if old else 0) + num_bytes - self.max_bytes
            victims = []
            for name, entry in self._entries.items():
                if excess <= 0:
                    break
                if entry.pins == 0 and name != key:
                    victims.append(name)
                    excess -= entry.num_bytes
            if excess > 0:
                return False
            for name in victims:
                self._num_bytes -= self._entries.pop(name).num_bytes
            self._num_bytes += num_bytes - (old.num_bytes if old else 0)
            self._entries[key] = _Entry(value, num_bytes, (old.pins if old else 0) + pin)
            self._entries.move_to_end(key)
            return True

    def pin(self, key: str) -> bool:
        """Protect an entry from eviction until as many `unpin` calls; False if it is not there."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return False
            entry.pins += 1
            return True

    def unpin(self, key: str) -> None:
        """Take back one `pin`.

        Raises:
            KeyError: the entry is not there or not pinned.
        """
        with self._lock:
            entry = self._entries[key]
            if entry.pins == 0:
                raise KeyError(f"{key} is not pinned")
            entry.pins -= 1

    def clear(self) -> None:
        """Forget everything that is not pinned."""
        with self._lock:
            for key in [key for key, entry in self._entries.items() if entry.pins == 0]:
                self._num_bytes -= self._entries.pop(key).num_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes held now; never more than ``max_bytes``."""
        return self._num_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes that cannot be evicted now."""
        with self._lock:
            return sum(entry.num_bytes for entry in self._entries.values() if entry.pins)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        """Whether it is there; does not count as a use."""
        with self._lock:
            return key in self._entries
