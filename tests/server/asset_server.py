"""A web server on loopback that hands out what a test gives it, good and bad."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Asset:
    """What one path answers with.

    Attributes:
        body: content.
        status: HTTP status.
        headers: further headers.
        stream: instead of ``body``: writes to the connection itself, after the headers.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: Callable[[Any, threading.Event], None] | None = None


@dataclass
class AssetServer:
    """A running server.

    Attributes:
        port: on 127.0.0.1.
        assets: path -> what it answers with; change it at any time.
        seen: (path, headers) of each request that came.
        closing: set when the server ends; what streams has to end too.
        server_names: the names that TLS clients asked for.
    """

    port: int
    assets: dict[str, Asset]
    scheme: str = "http"
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    server_names: list[str | None] = field(default_factory=list)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """The URL of an asset; ``host`` may be any name that leads here."""
        return f"{self.scheme}://{host}:{self.port}{path}"

    def put(self, path: str, body: bytes = b"", status: int = 200, **headers: str) -> str:
        """Add an asset; returns its URL."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.assets[path] = Asset(body, status, named)
        return self.url(path)


@contextmanager
def asset_server(tls: ssl.SSLContext | None = None) -> Iterator[AssetServer]:
    """Run one; with ``tls`` it speaks https."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            assets.seen.append((self.path, dict(self.headers.items())))
            asset = assets.assets.get(self.path, Asset(b"nothing here", 404))
            self.send_response(asset.status)
            for name, value in asset.headers.items():
                self.send_header(name, value)
            if asset.stream is None:
                if "Content-Length" not in asset.headers:
                    self.send_header("Content-Length", str(len(asset.body)))
                self.end_headers()
                self.wfile.write(asset.body)
            else:
                self.send_header("Connection", "close")
                self.end_headers()
                asset.stream(self.wfile, assets.closing)
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            """The tests look at `seen`."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that goes away is what some tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    assets = AssetServer(server.server_address[1], {})
    if tls is not None:

        def note_name(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            assets.server_names.append(name)

        tls.sni_callback = note_name
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        assets.scheme = "https"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield assets
    finally:
        assets.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
