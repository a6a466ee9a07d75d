"""The server process: socket, signals, a graceful end."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn

from opsin.config import EngineConfig
from opsin.errors import ConfigError
from opsin.server.app import App
from opsin.server.engine_host import EngineHost, Host
from opsin.server.http.connection import (
    AcceptErrors,
    Connection,
    ConnectionLimits,
    abort_all,
    raise_file_limit,
)
from opsin.server.replicas.door import Door
from opsin.server.replicas.host import ReplicaHost
from opsin.server.settings import Listen, ServerSettings

logger = logging.getLogger(__name__)

_CLOSE_S = 1
"""How long clients have to close their side of an idle connection, which TLS asks them to."""

_KEEP_ALIVE_S = 75
"""Longer than the 60 s after which common proxies close an idle connection: the proxy should close it."""


def serve(config: EngineConfig, settings: ServerSettings, listen: Listen) -> int:
    """Run a server until a signal ends it.

    The socket is open before the model is loaded; until then requests get a 503.

    Returns:
        Exit status: 0 after SIGTERM, 130 after SIGINT.

    Raises:
        ConfigError: the address cannot be listened on.
        BaseException: whatever made loading fail, or ended the engine.
    """
    host: Host
    if settings.data_parallel_size > 1:
        replicas = host = ReplicaHost(config, settings)
        app: App = Door(replicas, settings, on_loopback=listen.on_loopback)
    else:
        host = EngineHost(config)
        app = App(host, settings, on_loopback=listen.on_loopback)
    server = Server(app, listen, settings.shutdown_timeout)
    asyncio.run(server.run_until_stopped())
    if host.loading:
        # A thread inside of torch cannot be told to stop, and Python would crash tearing it down.
        sys.stderr.flush()
        os._exit(server.status)
    if server.failure is not None:
        raise server.failure
    return server.status


class Server(uvicorn.Server):
    """uvicorn's server, which goes on answering (with 503) while accepted requests finish."""

    def __init__(self, app: App, listen: Listen, shutdown_timeout_s: float | None) -> None:
        asked = app.limits
        limits = ConnectionLimits(
            max_connections=raise_file_limit(asked.max_connections),
            receive_timeout_s=asked.receive_timeout,
            send_timeout_s=asked.send_timeout,
        )
        super().__init__(
            uvicorn.Config(
                app.api,
                **asdict(listen),
                http=partial(Connection, limits),  # type: ignore[arg-type]
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_keep_alive=_KEEP_ALIVE_S,
            )
        )
        self.status = 0
        self.failure: BaseException | None = None
        self._app = app
        self._shutdown_timeout_s = shutdown_timeout_s
        self._stopping: asyncio.Task[None] | None = None
        self._stop_at = math.inf
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket: tuple[Path, int] | None = None

    async def run_until_stopped(self) -> None:
        """Serve; returns when everything accepted is answered."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(AcceptErrors())
        try:
            await self.serve()
        finally:
            self._remove_socket()
            self.failure = self._app.host.failure
            await self._app.aclose()

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        """The first signal stops the server in good order, the second at once."""
        if self._app.admission.stopping:
            self.should_exit = self.force_exit = True
            return
        self.status = 130 if sig == signal.SIGINT else 0
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.stop)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections. Clients that do not close theirs, or read nothing, hold nothing up."""
        ending = asyncio.ensure_future(super().shutdown(sockets))
        await asyncio.wait({ending}, timeout=_CLOSE_S)
        while not ending.done():
            # What is still unsent has its own time-out, unless time is up.
            time_is_up = self.force_exit or time.monotonic() >= self._stop_at
            abort_all(self.server_state.connections, idle_only=not time_is_up)
            await asyncio.wait({ending}, timeout=0.1)
        await ending

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        if self._app.host.failure is not None:
            return True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the socket, say where it is, begin to load the model.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        if self.config.uds is not None and sockets is None:
            sockets = [self._own_socket(Path(self.config.uds))]
        try:
            await super().startup(sockets)
        except (SystemExit, OSError):  # uvicorn has logged the reason; a Unix socket's it lets through
            where = self.config.uds or f"{self.config.host}:{self.config.port}"
            raise ConfigError(f"cannot listen on {where}; is it in use, or not this machine's?") from None
        print(f"opsin: listening on {self.url}", file=sys.stderr, flush=True)
        self._app.host.start()
        if self._app.batches is not None:
            self._app.batches.start()

    def _own_socket(self, path: Path) -> socket.socket:
        """A Unix socket for owner and group, less what the umask takes. A living server's is left alone.

        Raises:
            ConfigError: there is something else at the path, or the path cannot be.
        """
        if path.exists():
            if not path.is_socket():
                raise ConfigError(f"--uds {path}: there is a file of another kind")
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()  # of a server that was killed
                except OSError as error:
                    raise ConfigError(f"cannot listen on {path}: {error.strerror}") from None
                else:
                    raise ConfigError(f"cannot listen on {path}: a server answers there already")
        made = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o777)
        os.umask(mask | 0o117)
        try:
            made.bind(str(path))
        except OSError as error:
            made.close()
            raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from None
        finally:
            os.umask(mask)
        self._socket = path, path.stat().st_ino
        return made

    def _remove_socket(self) -> None:
        """Unless another server has put its own there."""
        if self._socket is not None:
            path, inode = self._socket
            with suppress(OSError):
                if path.stat().st_ino == inode:
                    path.unlink()

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        if self.config.uds is not None:
            return self.config.uds
        scheme = "https" if self.config.is_ssl else "http"
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def stop(self) -> None:
        """Admit no further requests; end when the admitted ones are answered. Call it on the event loop."""
        logger.info("stopping; %d requests are being finished", self._app.admission.num_requests)
        self._app.admission.stop()
        if self._shutdown_timeout_s is not None:
            self._stop_at = time.monotonic() + self._shutdown_timeout_s
        self._stopping = asyncio.ensure_future(self._stop_when_empty())

    async def _stop_when_empty(self) -> None:
        try:
            await asyncio.wait_for(self._app.admission.empty(), self._shutdown_timeout_s)
        except asyncio.TimeoutError:
            logger.warning("%d requests were not finished in time", self._app.admission.num_requests)
            self.force_exit = True
        self.should_exit = True
