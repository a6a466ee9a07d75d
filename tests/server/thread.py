"""The server's application on a thread of this process, on a real socket: starts faster than a process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from opsin.config import EngineConfig
from opsin.server.app import App
from opsin.server.engine_host import EngineHost
from opsin.server.settings import ServerSettings

KV_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ServerThread:
    """A running server.

    Attributes:
        url: without a slash at its end.
        app: what it runs.
    """

    url: str
    app: App


@contextmanager
def serve_in_thread(config: EngineConfig, settings: ServerSettings | None = None) -> Iterator[ServerThread]:
    """Run a server until the block ends; its model is loaded when the block begins."""
    host = EngineHost(config)
    app = App(host, settings or ServerSettings())
    server = uvicorn.Server(
        uvicorn.Config(app.api, port=0, lifespan="off", log_config=None, access_log=False)
    )

    async def run() -> None:
        await server.serve()
        await app.aclose()

    host.start()
    host.wait()
    if host.failure is not None:
        raise host.failure
    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield ServerThread(f"http://127.0.0.1:{port}", app)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"
