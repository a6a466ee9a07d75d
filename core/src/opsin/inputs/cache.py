"""Mapped media in host memory: a cache under a byte budget, and what prompts hold."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from queue import SimpleQueue
from typing import Generic, TypeVar

from opsin.api import PlacedMedia

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

    def discard(self, key: str) -> None:
        """Forget a value, if it is there."""
        with self._lock:
            _, freed = self._entries.pop(key, (None, 0))
            self.num_bytes -= freed

    def __len__(self) -> int:
        return len(self._entries)


class HeldMedia:
    """Counts the bytes of mapped media that prompts hold, those of equal content once. Thread-safe.

    Attributes:
        max_bytes: there is room below this.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._num_bytes = 0
        self._holders: dict[str, int] = {}
        # Objects end in any thread, even while it holds the lock: the queue's `put` takes none.
        self._released: SimpleQueue[tuple[str, int]] = SimpleQueue()
        self._lock = threading.Lock()

    def add(self, item: PlacedMedia) -> None:
        """Count an item until the object ends."""
        num_bytes = item.mapped.num_bytes
        with self._lock:
            holders = self._holders.get(item.key, 0)
            self._holders[item.key] = holders + 1
            self._num_bytes += 0 if holders else num_bytes
        weakref.finalize(item, self._released.put, (item.key, num_bytes)).atexit = False

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            while not self._released.empty():
                key, num_bytes = self._released.get()
                self._holders[key] -= 1
                if not self._holders[key]:
                    del self._holders[key]
                    self._num_bytes -= num_bytes
            return self._num_bytes

    def has_room(self) -> bool:
        """Whether further media may be mapped."""
        return self.num_bytes < self.max_bytes
