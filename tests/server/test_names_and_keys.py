"""Under which names, with which keys and over which sockets a server answers."""

from __future__ import annotations

import http.client
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from opsin.errors import ConfigError
from opsin.fetch.addresses import is_allowed
from opsin.fetch.settings import FetchSettings
from opsin.server.settings import Listen, ServerSettings
from tests.server.conftest import Parse
from tests.server.in_thread import MODEL, Running, golden_config, running


@pytest.fixture(scope="module")
def local() -> Iterator[Running]:
    with running(golden_config(), ServerSettings(allowed_hosts=("Box.lan",)), wait=False) as started:
        yield started


def status(server: Running, host: str | None, path: str = "/health") -> int:
    headers = {} if host is None else {"Host": host}
    return requests.get(server.url + path, headers=headers, timeout=10).status_code


OWN = ["localhost", "LOCALHOST:80", "127.0.0.1:9", "[::1]", "[::1]:8000", "box.lan:1", "box.lan."]
OTHERS = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.nip.io",
    "[::2]",
    "0x7f000001",
    "a@localhost",
    "",
]


@pytest.mark.parametrize("host", OWN)
def test_a_keyless_server_on_loopback_answers_for_its_own_names(local: Running, host: str) -> None:
    assert status(local, host) == 200


@pytest.mark.parametrize("host", OTHERS)
@pytest.mark.parametrize("path", ["/health", "/", "/v1/models", "/ui/app.js"])
def test_it_refuses_others(local: Running, host: str, path: str) -> None:
    assert status(local, host, path) in (400, 403)


def test_the_refusal_names_the_way_out(local: Running) -> None:
    refused = requests.get(f"{local.url}/health", headers={"Host": "evil.example"}, timeout=10)
    assert "--allowed-hosts" in refused.json()["error"]["message"]


def test_without_a_host_header_nothing_is_answered(local: Running) -> None:
    with socket.create_connection(local.server.servers[0].sockets[0].getsockname()) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b" 403 " in connection.recv(4096).splitlines()[0]


def test_with_a_key_any_name_will_do() -> None:
    with running(golden_config(), ServerSettings(api_key=("k",)), wait=False) as started:
        assert status(started, "anything.example") == 200


def test_any_header_may_come_from_an_allowed_origin() -> None:
    settings = ServerSettings(allowed_origins=("https://page.example",))
    with running(golden_config(), settings, wait=False) as started:
        asked = {
            "Origin": "https://page.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,x-stainless-os,x-stainless-retry-count",
        }
        answer = requests.options(f"{started.url}/v1/chat/completions", headers=asked, timeout=10)
        assert answer.status_code == 200
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert "x-stainless-os" in allowed
        assert "x-stainless-retry-count" in allowed


# ---- Keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_key_is_no_key(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.setenv("OPSIN_API_KEY", text)
    with pytest.raises(AssertionError, match="a usage error"):
        parse("m")
    assert "OPSIN_API_KEY) is empty" in capsys.readouterr().err


def test_keys_are_as_they_are_written(parse: Parse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPSIN_API_KEY", "two words")
    assert parse("m")[1].api_key == ["two words"]
    monkeypatch.delenv("OPSIN_API_KEY")
    for text, keys in {"0123": ["0123"], "1e5": ["1e5"], "[0777, yes]": ["0777", "yes"]}.items():
        file = tmp_path / "server.yaml"
        file.write_text(f"model: m\napi-key: {text}\n")
        assert parse("--config", str(file))[1].api_key == keys


# ---- Addresses and sockets -----------------------------------------------------------------------


def test_an_empty_host_would_listen_everywhere() -> None:
    with pytest.raises(ConfigError, match="would listen everywhere"):
        Listen(host="")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ssl_keyfile": "key"}, "--ssl-keyfile without --ssl-certfile"),
        ({"ssl_certfile": "cert"}, "--ssl-certfile without --ssl-keyfile"),
        ({"ssl_ca_certs": "ca"}, "--ssl-ca-certs without --ssl-certfile and --ssl-keyfile"),
        ({"ssl_keyfile_password": "x"}, "--ssl-keyfile-password without"),
        (
            {"ssl_keyfile": __file__, "ssl_certfile": "/no/such"},
            "--ssl-certfile /no/such: there is no such file",
        ),
    ],
)
def test_tls_is_whole_or_not_at_all(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Listen(**flags)


def ask(path: Path) -> int:
    connection = http.client.HTTPConnection("anything")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    connection.request("GET", "/health")
    return connection.getresponse().status


def refused(path: Path) -> str:
    """What the command says that cannot listen there."""
    command = [sys.executable, "-m", "opsin", "serve", MODEL, "--uds", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    return done.stderr


def test_a_unix_socket_is_the_servers_own(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    mask = os.umask(0o027)
    try:
        with running(golden_config(), listen=Listen(uds=str(path)), wait=False):
            assert stat.S_IMODE(path.stat().st_mode) == 0o640
            assert ask(path) == 200
            assert "a server answers there already" in refused(path)
            assert ask(path) == 200
        assert not path.exists(), "it is removed at the end"
    finally:
        os.umask(mask)


def test_a_socket_that_was_left_behind_is_taken_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen()"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert path.is_socket()
    with running(golden_config(), listen=Listen(uds=str(path)), wait=False):
        assert ask(path) == 200
    path.write_text("precious")
    assert "a file of another kind" in refused(path)
    assert path.read_text() == "precious"


# ---- Private pictures ----------------------------------------------------------------------------


def test_named_networks_may_be_fetched_from() -> None:
    networks = FetchSettings(allow_private_media=("10.20.0.0/16", "fd12:3456::/32")).private_networks
    for text, allowed in {
        "10.20.3.4": True,
        "::ffff:10.20.3.4": True,
        "64:ff9b::a14:304": True,
        "10.21.0.1": False,
        "192.168.0.1": False,
        "fd12:3456::1": True,
        "fd12:3457::1": False,
        "169.254.169.254": False,
        "127.0.0.1": False,
        "8.8.8.8": True,
    }.items():
        assert is_allowed(text, private=networks) == allowed, text


@pytest.mark.parametrize("text", ["10.20.0.1/16", "host", "10.0.0.0/4", "::/0", ""])
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="allow_private_media"):
        FetchSettings(allow_private_media=(text,))
