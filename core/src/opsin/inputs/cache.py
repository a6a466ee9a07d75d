"""A least-recently-used map under a byte budget, for mapped media."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")


class ByteLRU(Generic[V]):
    """A map that forgets the least recently used values once all exceed ``max_bytes``. Thread-safe.

    Attributes:
        max_bytes: the budget.
        num_bytes: bytes held now.
        queries: calls of `get`.
        hits: those that found something.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = self.queries = self.hits = 0
        self._entries: OrderedDict[str, tuple[V, int]] = OrderedDict()
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
            return entry[0]

    def put(self, key: str, value: V, num_bytes: int) -> bool:
        """Store a value, forgetting others as needed; False if it exceeds the budget by itself."""
        if num_bytes > self.max_bytes:
            return False
        with self._lock:
            _, replaced = self._entries.pop(key, (None, 0))
            self.num_bytes += num_bytes - replaced
            while self.num_bytes > self.max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self.num_bytes -= freed
            self._entries[key] = value, num_bytes
            return True

    def __len__(self) -> int:
        return len(self._entries)
