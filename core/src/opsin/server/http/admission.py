"""How many requests are in the house, and whether more come in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from opsin.server.http.errors import ApiError

_RETRY_FULL_S = 1
_RETRY_STOPPING_S = 10


class Admission:
    """Counts requests; belongs to one event loop.

    Attributes:
        max_requests: most at a time.
        num_requests: at the moment.
        stopping: nobody is let in any more.
    """

    def __init__(self, max_requests: int) -> None:
        self.max_requests = max_requests
        self.num_requests = 0
        self.stopping = False
        self._empty = asyncio.Event()

    def check(self) -> None:
        """Raises ApiError 503 if the server is stopping."""
        if self.stopping:
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "the server is shutting down",
                retry_after_s=_RETRY_STOPPING_S,
            )

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Be counted, from before the body is read until the last byte of the answer is written.

        Raises:
            ApiError: 503 while stopping, 429 when full.
        """
        self.check()
        if self.num_requests >= self.max_requests:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"the queue is full ({self.num_requests} requests); try again later",
                retry_after_s=_RETRY_FULL_S,
            )
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1
            if self.stopping and self.num_requests == 0:
                self._empty.set()

    def stop(self) -> None:
        """Let nobody in any more."""
        self.stopping = True
        if self.num_requests == 0:
            self._empty.set()

    async def empty(self) -> None:
        """Until the last request has left after `stop`."""
        await self._empty.wait()
