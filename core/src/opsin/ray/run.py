"""``opsin serve --ray``: deploys the application and waits for Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import sys
import threading

from ray import serve

from opsin.config import EngineConfig
from opsin.errors import ConfigError
from opsin.ray.deploy import deployed
from opsin.server.settings import Listen, ServerSettings


def serve_on_ray(config: EngineConfig, settings: ServerSettings, listen: Listen, replicas: int) -> int:
    """Serve until a signal comes; returns the exit status.

    Raises:
        ConfigError: the address is of a kind that Ray Serve does not listen on.
    """
    if listen.uds is not None or listen.ssl_certfile is not None or listen.port == 0:
        raise ConfigError("--ray listens on --host and --port, without TLS; put a proxy in front for that")
    stopped = threading.Event()
    status = 0

    def stop(number: int, _: object) -> None:
        nonlocal status
        status = 130 if number == signal.SIGINT else 0
        stopped.set()

    serve.start(http_options={"host": listen.host, "port": listen.port})
    serve.run(deployed(config, settings, replicas=replicas), name="opsin", route_prefix="/")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    print(f"opsin: listening on http://{listen.host}:{listen.port}", file=sys.stderr, flush=True)
    stopped.wait()
    serve.shutdown()
    return status
