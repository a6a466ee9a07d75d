"""Counts active requests, and decides whether to admit more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from opsin.server.http.errors import ApiError

_RETRY_FULL_S = 1
_RETRY_STOPPING_S = 10


class Admission:
    """Counts active requests, and bodies that are still being received; belongs to one event loop.

    Attributes:
        max_requests: most requests at a time.
        max_receiving_bytes: most bytes of bodies that are not complete yet, all together.
        num_requests: requests at the moment.
        num_receiving: requests whose body is not complete yet.
        receiving_bytes: bytes of them that have come.
        stopping: whether no further requests are admitted.
    """

    def __init__(self, max_requests: int, max_receiving_bytes: int) -> None:
        self.max_requests = max_requests
        self.max_receiving_bytes = max_receiving_bytes
        self.num_requests = self.num_receiving = self.receiving_bytes = 0
        self.stopping = False
        self._empty = asyncio.Event()

    def check(self) -> None:
        """Raises ApiError 503 if the server is stopping."""
        if self.stopping:
            raise ApiError(503, "the server is shutting down", retry_after_s=_RETRY_STOPPING_S)

    def check_room(self) -> None:
        """Raises ApiError 503 while stopping, 429 when full."""
        self.check()
        if self.num_requests >= self.max_requests:
            message = f"the queue is full ({self.num_requests} requests); try again later"
            raise ApiError(429, message, retry_after_s=_RETRY_FULL_S)

    @contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """Of one request, from its head until the last byte of the answer is written.

        Raises:
            ApiError: 503 while stopping, 429 when full: known before a body is received.
        """
        self.check_room()
        ticket = Ticket(self)
        try:
            yield ticket
        finally:
            ticket.end()

    def note_if_empty(self) -> None:
        """Wake up who waits for the last request to end."""
        if self.stopping and self.num_requests == 0:
            self._empty.set()

    def stop(self) -> None:
        """Admit no further requests."""
        self.stopping = True
        self.note_if_empty()

    async def empty(self) -> None:
        """Wait until the last request has ended after `stop`."""
        await self._empty.wait()


class Ticket:
    """One request's place: among the bodies that are being received, then among the requests."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_bytes = 0
        self._admitted = False
        admission.num_receiving += 1

    def received(self, num_bytes: int) -> None:
        """Count bytes of the body.

        Raises:
            ApiError: 503 if too many bodies are being received.
        """
        self._num_bytes += num_bytes
        self._admission.receiving_bytes += num_bytes
        if self._admission.receiving_bytes > self._admission.max_receiving_bytes:
            raise ApiError(503, "too many requests are being received", retry_after_s=_RETRY_FULL_S)

    def admit(self) -> None:
        """The body is complete: the request counts from now on.

        Raises:
            ApiError: 503 while stopping, 429 when full.
        """
        self._admission.check_room()
        self._release()
        self._admitted = True
        self._admission.num_requests += 1

    def end(self) -> None:
        """The request is answered, or gone."""
        if self._admitted:
            self._admission.num_requests -= 1
            self._admission.note_if_empty()
        else:
            self._release()

    def _release(self) -> None:
        self._admission.num_receiving -= 1
        self._admission.receiving_bytes -= self._num_bytes
