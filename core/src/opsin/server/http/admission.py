"""Counts active requests and decides whether to admit more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from opsin.server.http.errors import ApiError

_RETRY_FULL_S = 1
_RETRY_STOPPING_S = 10


class Admission:
    """Counts active requests; belongs to one event loop.

    Attributes:
        max_requests: most at a time.
        num_requests: requests at the moment.
        stopping: whether no further requests are admitted.
    """

    def __init__(self, max_requests: int) -> None:
        self.max_requests = max_requests
        self.num_requests = 0
        self.stopping = False
        self._empty = asyncio.Event()

    def check(self) -> None:
        """Raises ApiError 503 if the server is stopping."""
        if self.stopping:
            raise ApiError(503, "the server is shutting down", retry_after_s=_RETRY_STOPPING_S)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request, from before its body is read until the last byte of the answer is written.

        Raises:
            ApiError: 503 while stopping, 429 when full.
        """
        self.check()
        if self.num_requests >= self.max_requests:
            message = f"the queue is full ({self.num_requests} requests); try again later"
            raise ApiError(429, message, retry_after_s=_RETRY_FULL_S)
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1
            self._note_if_empty()

    def stop(self) -> None:
        """Admit no further requests."""
        self.stopping = True
        self._note_if_empty()

    async def empty(self) -> None:
        """Wait until the last request has ended after `stop`."""
        await self._empty.wait()

    def _note_if_empty(self) -> None:
        if self.stopping and self.num_requests == 0:
            self._empty.set()
