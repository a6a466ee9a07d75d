"""`opsin serve` as users run it: a process of its own, on a port of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from tests.server.asset_server import free_port

GOLDEN = Path(__file__).parents[1] / "golden"
START_S = 120


@dataclass(frozen=True)
class ServerProcess:
    """A running server.

    Attributes:
        url: without a slash at its end.
        process: the process.
        log: what it has written so far.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def serve(
    model: str,
    *flags: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    launcher: Sequence[str] = (),
    api_key: str | None = None,
) -> Iterator[ServerProcess]:
    """Run ``opsin serve``, wait until it is ready, and end it with SIGTERM.

    Args:
        model: folder or name.
        flags: more of the command line.
        log: file for what it writes.
        environment: more variables.
        launcher: arguments for Python before ``-m opsin``, e.g. a module that prepares the process.
        api_key: the key that it asks for.
    """
    port = free_port()
    flags += () if api_key is None else ("--api-key", api_key)
    command = [sys.executable, *launcher, "-m", "opsin", "serve", model, "--port", str(port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
    server = ServerProcess(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait(server, {} if api_key is None else {"Authorization": f"Bearer {api_key}"})
        yield server
        assert process.poll() is None, f"the server ended by itself:\n{log.read_text()}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: ServerProcess, headers: Mapping[str, str]) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        if server.process.poll() is not None:
            break
        try:
            if requests.get(f"{server.url}/ready", headers=headers, timeout=5).status_code == 200:
                return
        except requests.ConnectionError:
            pass  # not listening yet
        time.sleep(0.05)
    raise AssertionError(f"opsin serve did not become ready:\n{server.log.read_text()[-5000:]}")
