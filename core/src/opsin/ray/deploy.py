"""The server as a Ray Serve application: a door on every node, engines where Ray has room for them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from opsin.config import EngineConfig
from opsin.ray.placed import actor_options, settled
from opsin.server.app import App, as_json
from opsin.server.engine_host import EngineHost
from opsin.server.http.body import read_bytes
from opsin.server.http.disconnect import while_connected
from opsin.server.http.errors import ApiError
from opsin.server.replicas.routing import affinity
from opsin.server.schema import responses
from opsin.server.settings import ServerSettings

logger = logging.getLogger(__name__)

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
"""Requests about the same picture meet in one engine, and go to others where it is full."""

_ATTEMPTS = 2


class Engine:
    """One engine, and the server's routes for it, which are called without HTTP."""

    def __init__(self, config: EngineConfig, settings: ServerSettings) -> None:
        self._host = EngineHost(settled(config))
        self._app = App(self._host, settings)
        self._host.start()
        self._host.wait()
        if self._host.failure is not None:
            raise self._host.failure

    async def respond(
        self, method: str, path: str, request_id: str, body: bytes
    ) -> AsyncIterator[Mapping[str, Any]]:
        """The ASGI messages of an answer, as they come."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if given:
                return given.pop()
            await asyncio.Event().wait()  # the client's end is the end of this task
            raise AssertionError("nobody sets the event")

        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())],
            "client": None,
            "server": None,
        }

        async def run() -> None:
            try:
                await self._app.api(scope, receive, messages.put)
            finally:
                await messages.put(None)

        working = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await working
        finally:
            working.cancel()

    def check_health(self) -> None:
        """Ray asks; an exception has it start another engine in this one's place."""
        if self._host.failure is not None:
            raise self._host.failure


class _NoEngineHere:
    """Stands for an engine in the door's process."""

    loading, failure = False, None

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    def start(self) -> None:
        """Nothing is started here."""

    def engine(self) -> Any:
        """There is none."""
        raise ApiError(503, "the engines are elsewhere")

    def close(self) -> None:
        """Nothing is closed here."""


class RayDoor(App):
    """See `opsin.server.app.App`: its routes and guards, answered by engines on the cluster."""

    def __init__(
        self, config: EngineConfig, settings: ServerSettings, engines: DeploymentHandle[Any]
    ) -> None:
        super().__init__(_NoEngineHere(config), settings)
        self._engines = engines

    async def ready(self) -> Response:
        """Whether requests are answered: Ray routes to doors only when engines are there."""
        self.admission.check()
        return as_json(responses.Status(status="ready"))

    async def metrics(self) -> Response:
        """Of the engine that happens to be asked; Ray's own metrics are of all."""
        return await self._ask("GET", "/metrics", "metrics", b"", b"")

    async def model(self, model: str) -> Response:
        """One served model."""
        return await self._ask("GET", f"/v1/models/{model}", "model", b"", b"")

    async def models(self) -> Response:
        """The served models."""
        return await self._ask("GET", "/v1/models", "models", b"", b"")

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation with text, pictures and videos."""
        return await self._pass_on(request)

    async def completions(self, request: Request) -> Response:
        """Go on with plain text."""
        return await self._pass_on(request)

    async def embeddings(self, request: Request) -> Response:
        """Turn texts, or messages with pictures, into vectors."""
        return await self._pass_on(request)

    async def score(self, request: Request) -> Response:
        """Say how similar texts are."""
        return await self._pass_on(request)

    async def rerank(self, request: Request) -> Response:
        """Put documents in the order of their similarity to a query."""
        return await self._pass_on(request)

    async def pooling(self, request: Request) -> Response:
        """Turn texts into vectors, in vLLM's form."""
        return await self._pass_on(request)

    async def responses(self, request: Request) -> Response:
        """Answer items with items."""
        return await self._pass_on(request)

    async def messages(self, request: Request) -> Response:
        """Answer a conversation, in Anthropic's words."""
        return await self._pass_on(request)

    async def count_tokens(self, request: Request) -> Response:
        """Count the tokens of a conversation, in Anthropic's words."""
        return await self._pass_on(request)

    async def tokenize(self, request: Request) -> Response:
        """Count and show the tokens of a text or a conversation, pictures expanded."""
        return await self._pass_on(request)

    async def detokenize(self, request: Request) -> Response:
        """Turn token ids back into text."""
        return await self._pass_on(request)

    async def _pass_on(self, request: Request) -> Response:
        body = await read_bytes(
            request, max_bytes=self.limits.max_body_bytes, timeout_s=self.limits.receive_timeout
        )
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        asking = self._ask("POST", path, request.state.request_id, body, affinity(body))
        return await while_connected(request.receive, asking)

    async def _ask(self, method: str, path: str, request_id: str, body: bytes, key: bytes) -> Response:
        session = hashlib.blake2b(key, digest_size=8).hexdigest()
        for attempt in range(_ATTEMPTS):
            answer = self._engines.options(stream=True, session_id=session).respond.remote(
                method, path, request_id, body
            )
            messages = aiter(answer)
            try:
                head = await anext(messages)
                first = await anext(messages)
            except RayError as error:
                logger.warning("request %s: the engine was lost: %s", request_id, type(error).__name__)
                if attempt + 1 == _ATTEMPTS:
                    raise ApiError(503, "two engines ended with this request; try again later") from None
                continue
            return _Relayed(head, first, messages, request_id)
        raise AssertionError("the last attempt returns or raises")


class _Relayed(Response):
    """An answer from elsewhere, message by message; if it ends in the middle, that is its last event."""

    def __init__(
        self,
        head: Mapping[str, Any],
        first: Mapping[str, Any],
        rest: AsyncIterator[Mapping[str, Any]],
        request_id: str,
    ) -> None:
        super().__init__(status_code=head["status"])
        self._head, self._first, self._rest, self._request_id = head, first, rest, request_id
        self._streams = any(b"event-stream" in value for _, value in head["headers"])

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send(dict(self._head))
        await send(dict(self._first))
        if not self._first.get("more_body"):
            return
        try:
            async for message in self._rest:
                await send(dict(message))
        except RayError:
            logger.warning("request %s: the engine was lost in the middle of its stream", self._request_id)
            error = ApiError(503, "the engine that made this answer has ended; what came is incomplete")
            told = f"\n\ndata: {error.body().model_dump_json()}\n\ndata: [DONE]\n\n".encode()
            await send({"type": "http.response.body", "body": told * self._streams, "more_body": False})


def deployed(
    config: EngineConfig,
    http: ServerSettings,
    *,
    replicas: int = 1,
    autoscaling: Mapping[str, Any] | None = None,
    cpus: float | None = None,
    doors: int = 1,
) -> serve.Application:
    """`app`, of settings that are checked already."""
    scale: dict[str, Any] = (
        {"num_replicas": replicas} if autoscaling is None else {"autoscaling_config": autoscaling}
    )
    options = actor_options(config, cpus)
    bundle = {"CPU": options["num_cpus"], **options.get("resources", {})}
    engines = serve.deployment(
        Engine,
        name="opsin-engine",
        ray_actor_options=options,
        placement_group_bundles=[bundle],
        placement_group_strategy="STRICT_PACK",
        max_ongoing_requests=config.max_num_seqs + http.limits.max_waiting,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        health_check_period_s=2,
        **scale,
    )
    inner = replace(http, api_key=(), root_path="", ui=False, allowed_origins=())
    door = serve.deployment(serve.ingress(_door)(_Door), name="opsin-door", num_replicas=doors)
    door = door.options(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000)
    return door.bind(config, http, engines.bind(config, inner))


class _Door:
    """The process behind `_door`; Ray gives it its arguments."""

    current: _Door | None = None

    def __init__(
        self, config: EngineConfig, settings: ServerSettings, engines: DeploymentHandle[Any]
    ) -> None:
        self.door = RayDoor(config, settings, engines)
        _Door.current = self


def _door() -> Any:
    """The ASGI application of this process."""
    made = _Door.current
    assert made is not None, "Ray makes the door before it asks for its application"
    return made.door.api
