"""Prompts prepared in a small thread pool, in order, a bounded number and a bounded size ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Feed(Generic[T]):
    """Lets decoding, mapping and hashing overlap with the engine's steps, and bounds the pictures in memory.

    Args:
        jobs: functions that prepare one prompt each. An iterator is read as prompts are taken, in the thread
            that takes them.
        num_threads: size of the pool.
        ahead: most prompts prepared before they are taken.
        has_room: whether memory allows one more. What is prepared at the moment is not counted yet, so there
            may be ``num_threads`` prompts more than that.
    """

    def __init__(
        self,
        jobs: Iterable[Callable[[], T]],
        *,
        num_threads: int,
        ahead: int,
        has_room: Callable[[], bool] = lambda: True,
    ) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="opsin-media")
        self._num_threads, self._ahead, self._has_room = num_threads, ahead, has_room
        self._jobs = enumerate(jobs)
        self._read_ahead: deque[tuple[int, Callable[[], T]]] = deque()
        self._coming: deque[tuple[int, Future[T]]] = deque()
        self._lock = threading.RLock()  # a future that is done calls back at once
        self._read()
        self._submit()

    def __bool__(self) -> bool:
        """Whether any prompt is left to take."""
        return bool(self._coming or self._read_ahead)

    def take(self, timeout_s: float | None) -> tuple[int, Future[T]] | None:
        """The next prompt's index and finished future.

        Args:
            timeout_s: how long to wait for it. None: until it is there, even if there is no room for it.

        Returns:
            None if it is not ready in time, or waits for room.
        """
        self._submit(at_least_one=timeout_s is None)
        self._read()
        if not self._coming:
            return None
        index, future = self._coming[0]
        wait([future], timeout=timeout_s)
        if not future.done():
            return None
        with self._lock:
            self._coming.popleft()
        self._submit()
        return index, future

    def close(self) -> None:
        """Prepare nothing more."""
        with self._lock:
            self._read_ahead.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self) -> None:
        """Read as many jobs as keep the pool at work until the next prompt is taken."""
        while len(self._read_ahead) < self._num_threads:
            job = next(self._jobs, None)
            if job is None:
                break
            self._read_ahead.append(job)

    def _submit(self, *, at_least_one: bool = False) -> None:
        with self._lock:
            while self._read_ahead and (self._may_go_on() or (at_least_one and not self._coming)):
                index, job = self._read_ahead.popleft()
                future = self._pool.submit(job)
                self._coming.append((index, future))
                future.add_done_callback(lambda _: self._submit())

    def _may_go_on(self) -> bool:
        num_running = sum(not future.done() for _, future in self._coming)
        return len(self._coming) < self._ahead and num_running < self._num_threads and self._has_room()
