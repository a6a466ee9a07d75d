"""Connections that are slow, idle or many: each has its bounds, and nobody else notices."""

from __future__ import annotations

import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import trustme

from opsin.server.http import connection as module
from opsin.server.settings import Listen, RequestLimits, ServerSettings
from tests.server.in_thread import MODEL, Running, golden_config, running
from tests.server.messages import user
from tests.server.process import serve

CHAT = "/v1/chat/completions"
FLAGS = ("--dtype", "float32", "--kv-cache-memory", str(2**23))
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextmanager
def limited(**limits: Any) -> Iterator[Running]:
    config = golden_config(max_num_seqs=2)
    with running(config, ServerSettings(limits=RequestLimits(**limits))) as server:
        yield server


def connect(url: str, *, receive_buffer: int | None = None) -> socket.socket:
    address = urlsplit(url)
    client = socket.socket()
    client.settimeout(30)
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect((address.hostname or "", address.port or 0))
    return client


def rest_of(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    pieces = []
    while piece := client.recv(2**16):
        pieces.append(piece)
    return b"".join(pieces)


def get_health(client: socket.socket) -> None:
    """Ask on a connection that stays open, and read the whole answer."""
    client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while b'{"status":"ok"}' not in answer:
        piece = client.recv(1000)
        assert piece, answer
        answer += piece
    assert answer.startswith(b"HTTP/1.1 200")


def answers(server: Running) -> bool:
    body = {"messages": user("Hello"), "max_tokens": 2}
    return server.post(CHAT, body).status_code == 200


def test_a_request_has_to_come_in_time() -> None:
    with limited(receive_timeout=0.2) as server:
        silent, half, dripping = connect(server.url), connect(server.url), connect(server.url)
        half.sendall(HEAD.encode())
        dripping.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        for client in (silent, half, dripping):
            answer = rest_of(client)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'"code":408' in answer
            assert b"connection: close" in answer.lower()
        assert answers(server)


def test_time_runs_anew_for_each_request_of_a_connection() -> None:
    with limited(receive_timeout=0.4) as server, connect(server.url) as client:
        for _ in range(3):
            get_health(client)
            time.sleep(0.2)
        client.sendall(b"GET /health")
        assert rest_of(client).startswith(b"HTTP/1.1 408")


def test_a_large_body_may_take_longer() -> None:
    """Its time grows with what has come."""
    body = b'{"messages": "' + b"x" * 2**16 + b'"}'
    with limited(receive_timeout=0.5) as server, connect(server.url) as client:
        client.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode())
        client.sendall(body[: 2**15])
        time.sleep(1)  # two seconds more for 32 kB
        client.sendall(body[2**15 :])
        assert client.recv(1000).startswith(b"HTTP/1.1 400")


def test_bodies_that_are_not_complete_take_no_place() -> None:
    with limited(max_waiting=0) as server, ExitStack() as stack:  # room for two requests
        for _ in range(8):
            client = stack.enter_context(connect(server.url))
            client.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        deadline = time.monotonic() + 30
        while server.app.admission.num_receiving < 8:
            assert time.monotonic() < deadline
        assert answers(server)
        assert server.app.admission.receiving_bytes == 8
        stack.close()
        while server.app.admission.num_receiving:
            assert time.monotonic() < deadline
        assert server.app.admission.receiving_bytes == 0


def test_bytes_of_incomplete_bodies_are_bounded_together() -> None:
    with (
        limited(max_receiving_bytes=1000) as server,
        connect(server.url) as first,
        connect(server.url) as second,
    ):
        first.sendall(f"{HEAD}Content-Length: 900\r\n\r\n".encode() + b" " * 800)
        while server.app.admission.receiving_bytes < 800:
            pass
        second.sendall(f"{HEAD}Content-Length: 900\r\n\r\n".encode() + b" " * 800)
        answer = second.recv(2000)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after" in answer.lower()
        first.sendall(b" " * 100)
        assert first.recv(2000).startswith(b"HTTP/1.1 400")  # it is no JSON


def test_beyond_the_limit_idle_connections_give_way() -> None:
    with limited(max_connections=3) as server, ExitStack() as stack:
        clients = [stack.enter_context(connect(server.url)) for _ in range(3)]
        for client in clients:
            get_health(client)
        assert requests.get(f"{server.url}/health", timeout=30).status_code == 200
        assert rest_of(clients[0]) == b""
        get_health(clients[2])


def test_beyond_the_limit_a_new_connection_is_refused_if_none_is_idle() -> None:
    with limited(max_connections=2) as server, ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(connect(server.url)).sendall(HEAD.encode())
        deadline = time.monotonic() + 30
        while len(server.server.server_state.connections) < 2:
            assert time.monotonic() < deadline
        late = stack.enter_context(connect(server.url))
        answer = rest_of(late)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"too many connections" in answer


def unread(url: str) -> socket.socket:
    """A client that asks for much and reads nothing."""
    client = connect(url, receive_buffer=4096)
    client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300)
    return client


def is_stuck(server: Running) -> bool:
    return any(
        connection.transport.get_write_buffer_size()
        for connection in module._ours(list(server.server.server_state.connections))
    )


def test_who_reads_nothing_is_disconnected() -> None:
    with limited(send_timeout=0.2) as server, unread(server.url) as client:
        deadline = time.monotonic() + 30
        while server.server.server_state.connections:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        client.settimeout(1)
        assert answers(server)


def test_who_reads_slowly_is_not() -> None:
    with limited(send_timeout=0.5) as server, unread(server.url) as client:
        received = 0
        for _ in range(15):
            time.sleep(0.1)
            received += len(client.recv(2**20))
        assert received > 0
        assert len(module._ours(server.server.server_state.connections)) == 1


def test_who_reads_nothing_holds_no_shutdown_up() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(limited(send_timeout=600))
        server.server._shutdown_timeout_s = 0.5
        client = stack.enter_context(unread(server.url))
        deadline = time.monotonic() + 30
        while not is_stuck(server):
            assert time.monotonic() < deadline
        server.server.handle_exit(signal.SIGTERM, None)
        while server.server.server_state.connections:
            assert time.monotonic() < deadline
        del client


def test_an_idle_tls_client_holds_no_shutdown_up(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    issued.private_key_pem.write_to_path(str(key))
    issued.cert_chain_pems[0].write_to_path(str(certificate))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    listen = Listen(port=0, ssl_keyfile=str(key), ssl_certfile=str(certificate))
    with running(golden_config(), listen=listen) as server:
        client = context.wrap_socket(connect(server.url), server_hostname="localhost")
        get_health(client)
        server.server.handle_exit(signal.SIGTERM, None)
        deadline = time.monotonic() + 20  # 30 s is what asyncio gives such a client
        while server.server.server_state.connections:
            assert time.monotonic() < deadline


def test_running_out_of_files_neither_fills_the_log_nor_ends_the_server(tmp_path: Path) -> None:
    with ExitStack() as stack:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        launcher = ("-c", _WITH_FEW_FILES)
        server = stack.enter_context(serve(MODEL, *FLAGS, log=tmp_path / "log", launcher=launcher))
        clients = [stack.enter_context(connect(server.url)) for _ in range(150)]
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(1)
        for client in clients:
            client.close()
        deadline = time.monotonic() + 30
        while requests.get(f"{server.url}/health", timeout=30).status_code != 200:  # they are being closed
            assert time.monotonic() < deadline
        assert server.log.stat().st_size < 20_000
        assert "at most 50 connections: this process may open 100 files" in server.log.read_text()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == hard


_WITH_FEW_FILES = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
sys.argv = ["opsin", *sys.argv[3:]]
runpy.run_module("opsin", run_name="__main__")
"""


def test_a_low_file_limit_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
        assert module.raise_file_limit(1000) == 1000
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1000 + module.SPARE_FILES
        assert module.raise_file_limit(10) == 10
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1000 + module.SPARE_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes process namespaces")
def test_sigterm_reaches_the_first_process_of_a_container_while_it_imports(tmp_path: Path) -> None:
    command = [
        "unshare",
        "--fork",
        "--pid",
        "--kill-child",
        sys.executable,
        "-m",
        "opsin",
        "serve",
        MODEL,
        *FLAGS,
    ]
    with (tmp_path / "log").open("wb") as log:
        unshare = subprocess.Popen([*command, "--port", "0"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
            while not (found := children.read_text().split()):
                assert time.monotonic() < deadline
            first = int(found[0])
            while "cyclopts" not in Path(f"/proc/{first}/maps").read_text() and not _handles_sigterm(first):
                assert time.monotonic() < deadline, "the handler never came"
            os.kill(first, signal.SIGTERM)
            assert unshare.wait(30) in (143, 0)
        finally:
            unshare.kill()
            unshare.wait()


def _handles_sigterm(pid: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line)
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
