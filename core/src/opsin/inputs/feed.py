"""Prompts prepared in a small thread pool, in order, a bounded number ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Feed(Generic[T]):
    """Lets decoding, mapping and hashing overlap with the engine's steps, and bounds the pictures in memory.

    Args:
        jobs: functions that prepare one prompt each. An iterator is read as prompts are taken.
        num_threads: size of the pool.
        ahead: most prompts prepared before they are taken.
    """

    def __init__(self, jobs: Iterable[Callable[[], T]], *, num_threads: int, ahead: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="opsin-media")
        self._jobs = enumerate(jobs)
        self._coming: deque[tuple[int, Future[T]]] = deque()
        for _ in range(ahead):
            self._submit()

    def __bool__(self) -> bool:
        """Whether any prompt is left to take."""
        return bool(self._coming)

    def take(self, timeout_s: float | None) -> tuple[int, Future[T]] | None:
        """The next prompt's index and finished future; None if it is not ready within ``timeout_s``."""
        index, future = self._coming[0]
        wait([future], timeout=timeout_s)
        if not future.done():
            return None
        self._coming.popleft()
        self._submit()
        return index, future

    def close(self) -> None:
        """Prepare nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        for index, job in self._jobs:
            self._coming.append((index, self._pool.submit(job)))
            return
