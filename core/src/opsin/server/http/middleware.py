"""What every request passes on its way in: id and log line, root path, API key, admission."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Collection, Sequence

from starlette._utils import get_route_path  # the router's own, so that both agree on what is open
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opsin.server.http.admission import Admission
from opsin.server.http.disconnect import ClientGone
from opsin.server.http.errors import ApiError, api_error
from opsin.server.metrics import Metrics

logger = logging.getLogger(__name__)
access = logging.getLogger("opsin.access")

OPEN_PATHS = frozenset({"/health", "/ping", "/version"})
"""Paths that need no API key and are answered while the server stops."""

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

_SAFE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_CLIENT_CLOSED_REQUEST = 499
"""nginx's status, for the log only: there is no client to send it to."""


class RequestLog:
    """Outermost: gives each request an id, turns exceptions into answers, writes the access log."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()
        status: int | None = None

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except ClientGone:
            status = _CLIENT_CLOSED_REQUEST
        except Exception as error:
            answer = api_error(error, request_id)
            if answer.status == 500:
                logger.exception("request %s failed", request_id)
            if status is None:
                await answer.response()(scope, receive, send_named)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.answered(scope["method"], route, status or 0)
            client = (scope.get("client") or ("-",))[0]
            path = scope["path"].encode("unicode_escape").decode()[:200]
            seconds = time.monotonic() - started
            access.info(
                '%s "%s %s" %s %.3fs id=%s',
                *(client, scope["method"], path, status or "-", seconds, request_id),
                extra={
                    "client": client,
                    "method": scope["method"],
                    "path": path,
                    "status": status,
                    "seconds": round(seconds, 4),
                    "request_id": request_id,
                },
            )


class RootPath:
    """Tells the router the prefix under which a proxy shows the server, whether it removes it or not."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self._root_path
        await self._app(scope, receive, send)


class KnownHosts:
    """Refuses requests to names that are not this server's.

    The page of a stranger may have its own name lead to this machine (DNS rebinding): to the browser, what is
    here is then that page's own. The name is in the Host header, which pages cannot set.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = frozenset(name.lower() for name in (*_LOOPBACK_NAMES, *names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = Headers(scope=scope).get("host", "")
            name = re.sub(r":\d*$", "", given).rstrip(".").lower()
            if name not in self._names:
                raise ApiError(
                    403,
                    "this server has no key and answers only for localhost; the operator can add a name with "
                    "--allowed-hosts, or set --api-key",
                )
        await self._app(scope, receive, send)


class ApiKeys:
    """Lets requests through that bring a key. Every path needs one unless it is listed as open."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Collection[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and get_route_path(scope) not in self._open_paths:
            given = _given_key(scope)
            # Digests have one length and all are compared: the time tells nothing about the keys.
            matches = [hmac.compare_digest(_digest(given), digest) for digest in self._digests]
            if not any(matches):
                raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY")
        await self._app(scope, receive, send)


class Admit:
    """Gives requests that do work a ticket, and turns away those beyond the limit."""

    def __init__(self, app: ASGIApp, admission: Admission, open_paths: Collection[str]) -> None:
        self._app = app
        self._admission = admission
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or get_route_path(scope) in self._open_paths:
            await self._app(scope, receive, send)
        elif scope["method"] == "POST":
            with self._admission.ticket() as ticket:
                scope["state"]["ticket"] = ticket  # for who reads the body
                await self._app(scope, receive, send)
        else:
            self._admission.check()
            await self._app(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _given_key(scope: Scope) -> bytes:
    given = Headers(scope=scope).get("authorization", "").encode("latin-1")
    scheme, _, key = given.partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    # As Anthropic's clients send it.
    return Headers(scope=scope).get("x-api-key", "").encode("latin-1").strip()
