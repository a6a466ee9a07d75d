"""The server on a thread of this process, on a real socket: quicker to start than a process of its own."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import requests

from opsin import EngineConfig
from opsin.engine.engine import Engine
from opsin.server.app import App
from opsin.server.engine_host import EngineHost
from opsin.server.run import Server
from opsin.server.settings import Listen, ServerSettings
from tests.server.process import GOLDEN

MODEL = str(GOLDEN / "qwen2vl" / "model")
TIMEOUT_S = 60


@dataclass(frozen=True)
class Running:
    """A running server.

    Attributes:
        url: without a slash at its end.
        app: the application.
        server: the server.
    """

    url: str
    app: App
    server: Server

    @property
    def engine(self) -> Engine:
        """The loaded engine."""
        return self.app.host.engine().engine

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        """POST ``body`` as JSON."""
        return requests.post(self.url + path, json=body, timeout=TIMEOUT_S, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        """GET."""
        return requests.get(self.url + path, timeout=TIMEOUT_S, **options)

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """OpenAI's client for it; it does not try again by itself."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=TIMEOUT_S)

    def wait_idle(self) -> None:
        """Until nothing is computed and nothing is waited for."""
        ends = time.monotonic() + TIMEOUT_S
        while self.engine.has_unfinished() or self.app.admission.num_requests:
            assert time.monotonic() < ends, "requests are stuck"
            time.sleep(0.01)


def golden_config(**settings: Any) -> EngineConfig:
    """The recorded Qwen2-VL model, in little memory."""
    given = {"model": MODEL, "dtype": "float32", "kv_cache_memory": 2**23, **settings}
    return EngineConfig(**given)


@contextmanager
def running(
    config: EngineConfig, settings: ServerSettings | None = None, listen: Listen | None = None, **host: Any
) -> Iterator[Running]:
    """Run a server until the block is left. ``host`` goes to `EngineHost`; with ``wait=False`` as soon as it
    listens, otherwise when it is ready."""
    wait = host.pop("wait", True)
    listen = listen or Listen(port=0)
    app = App(EngineHost(config, **host), settings or ServerSettings(), on_loopback=listen.on_loopback)
    server = Server(app, listen, shutdown_timeout_s=10)
    thread = threading.Thread(target=lambda: asyncio.run(server.run_until_stopped()), name="test-server")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        if wait:
            app.host.wait()
            assert app.host.failure is None, app.host.failure
        yield Running(server.url, app, server)
    finally:
        if server.failure is None:  # otherwise it has ended by itself
            server.handle_exit(signal.SIGTERM, None)
        thread.join()
