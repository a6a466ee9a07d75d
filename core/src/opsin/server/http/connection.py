"""A client's connection: how long it may take, and how many there may be. HTTP itself is uvicorn's."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import resource
import sys
import termios
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from opsin.server.http.errors import ApiError

logger = logging.getLogger(__name__)

SPARE_FILES = 256
"""Files for everything but connections: the model, logs, fetched pictures, the listening sockets."""


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What a connection may cost.

    Attributes:
        max_connections: most at a time.
        receive_timeout_s: seconds that the head of a request may take.
        send_timeout_s: seconds that a client may read nothing while there is something to send.
    """

    max_connections: int
    receive_timeout_s: float
    send_timeout_s: float


def raise_file_limit(max_connections: int) -> int:
    """Let this process open as many files as the connections need; how many connections it can have.

    Without it, accepting fails when files run out, again and again.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    possible = max(1, soft - SPARE_FILES if soft > 2 * SPARE_FILES else soft // 2)
    logger.warning("at most %d connections: this process may open %d files (ulimit -n)", possible, soft)
    return possible


class Connection(H11Protocol):
    """uvicorn's connection, with deadlines.

    The head of a request has to come within a time; the body's time is kept by who reads it. A client that
    takes nothing of what is sent is disconnected.
    """

    def __init__(self, limits: ConnectionLimits, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self.idle_since: float | None = None
        """When the last answer was complete; None before the first one, and while a request is answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refused if there are too many, and none of them is idle."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections and not self._close_an_idle_one():
            self._refuse(ApiError(503, "too many connections; try again later", retry_after_s=1, closes=True))
            return
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The timers end with it."""
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """While a head is incomplete, its time runs."""
        self.idle_since = None
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            if self._head_timer is None:
                self._start_head_timer()
        else:
            self._stop_head_timer()

    def on_response_complete(self) -> None:
        """From now on the connection is idle, unless the next request is there already."""
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """What is sent is not taken."""
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        """It is."""
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        super().resume_writing()

    def abort(self) -> None:
        """End it at once, whatever is unsent."""
        self._stop_timers()
        self.transport.abort()

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way: between two, or before the first byte of the first."""
        return self.cycle is None or self.cycle.response_complete

    # ---- deadlines ----------------------------------------------------------------------------

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.receive_timeout_s, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_timers(self) -> None:
        self._stop_head_timer()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        self._refuse(ApiError(408, "the request did not come in time", closes=True))

    def _watch_sending(self) -> None:
        self._unsent = self._not_taken()
        self._send_timer = self.loop.call_later(self._limits.send_timeout_s, self._check_sending)

    def _not_taken(self) -> int:
        """Bytes that the client has not acknowledged; a slow one takes the kernel's first."""
        in_kernel = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(in_kernel, sys.byteorder)

    def _check_sending(self) -> None:
        if self._not_taken() >= self._unsent:
            logger.info("a client read nothing for %g s and was disconnected", self._limits.send_timeout_s)
            self.abort()
        else:
            self._watch_sending()

    # ---- the number of connections --------------------------------------------------------------

    def _close_an_idle_one(self) -> bool:
        idle = [
            c for c in _ours(self.connections) if c.idle_since is not None and not c.transport.is_closing()
        ]
        if not idle:
            return False
        min(idle, key=lambda c: c.idle_since or 0).shutdown()
        return True

    def _refuse(self, error: ApiError) -> None:
        response = error.response()
        head = [f"HTTP/1.1 {error.status} {error.body().error.type}"]
        head += [
            f"{name.decode('latin-1')}: {value.decode('latin-1')}" for name, value in response.raw_headers
        ]
        self.transport.write("\r\n".join([*head, "", ""]).encode("latin-1") + bytes(response.body))
        self.transport.close()


def _ours(connections: Iterable[Any]) -> list[Connection]:
    return [connection for connection in connections if isinstance(connection, Connection)]


def abort_all(connections: Iterable[Any], *, idle_only: bool) -> None:
    """End connections at once: all, or those without a request and without anything unsent."""
    for connection in _ours(connections):
        if not idle_only or (connection.is_idle and not connection.transport.get_write_buffer_size()):
            connection.abort()


class AcceptErrors:
    """An event loop's exception handler: that connections cannot be accepted is said once a minute.

    asyncio tries again after a second, but reports the error for each place of the listening queue.
    """

    def __init__(self) -> None:
        self._next_time = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what asyncio reports."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _OUT_OF_RESOURCES or "socket" not in context:
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._next_time:
            self._next_time = time.monotonic() + 60
            logger.error("connections have to wait: %s; is `ulimit -n` too low?", error.strerror)


_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
