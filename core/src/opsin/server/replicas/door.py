"""The door: the routes of one server, each answered by a replica."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

import httpx2
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from opsin.server.app import App, as_json
from opsin.server.http.body import read_bytes
from opsin.server.http.disconnect import while_connected
from opsin.server.http.errors import ApiError
from opsin.server.replicas.host import Replica, ReplicaHost
from opsin.server.replicas.routing import affinity
from opsin.server.schema import responses
from opsin.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_PASSED_ON = ("content-type", "cache-control", "retry-after", "x-accel-buffering")
"""Headers of a replica's answer. Its request id is the door's."""

_ATTEMPTS = 2


class _ReplicaLostError(Exception):
    """A replica ended before anything of its answer was sent."""


class Door(App):
    """See `opsin.server.app.App`, whose routes and guards it has."""

    def __init__(self, host: ReplicaHost, settings: ServerSettings, *, on_loopback: bool = False) -> None:
        super().__init__(host, settings, on_loopback=on_loopback)
        self._replicas = host

    async def health(self) -> Response:
        """Whether the process lives; replicas may still be loading."""
        if self.host.failure is not None:
            self._replicas.pick(b"")
        return as_json(responses.Status(status="ok"))

    async def ready(self) -> Response:
        """Whether requests are answered."""
        self.admission.check()
        self._replicas.pick(b"")
        return as_json(responses.Status(status="ready"))

    async def metrics(self) -> Response:
        """Metrics in Prometheus' text format: of all replicas together, and of each."""
        await self._replicas.read_metrics()
        return self._told(self._metrics.http_text(self._replicas.totals))

    async def model(self, model: str) -> Response:
        """One served model."""
        return await self._get(f"/v1/models/{model}")

    async def models(self) -> Response:
        """The served models."""
        return await self._get("/v1/models")

    async def _get(self, path: str) -> Response:
        try:
            answer = await self._replicas.pick(b"").client.get(path)
        except httpx2.HTTPError:
            raise ApiError(503, "the replica that was asked has ended; try again") from None
        return Response(answer.content, answer.status_code, media_type="application/json")

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
        self._replicas.pick(b"")  # a server that cannot answer need not receive pictures first
        body = await read_bytes(
            request, max_bytes=self.limits.max_body_bytes, timeout_s=self.limits.receive_timeout
        )
        key, tried = affinity(body), list[Replica]()
        while True:
            replica = self._replicas.pick(key, tried)
            tried.append(replica)
            try:
                return await self._ask(request, replica, body)
            except _ReplicaLostError:
                self._replicas.lost(replica)
                logger.warning(
                    "replica %d was lost with request %s", replica.number, request.state.request_id
                )
                if len(tried) == _ATTEMPTS:
                    raise ApiError(503, "two replicas ended with this request; try again later") from None

    async def _ask(self, request: Request, replica: Replica, body: bytes) -> Response:
        sent = replica.client.build_request(
            "POST",
            request.url.path.removeprefix(request.scope.get("root_path", "")),
            content=body,
            headers={"Content-Type": "application/json", "X-Request-Id": request.state.request_id},
        )
        replica.load += 1
        kept = False
        try:
            answer = await while_connected(request.receive, replica.client.send(sent, stream=True))
            headers = {name: value for name in _PASSED_ON if (value := answer.headers.get(name)) is not None}
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                content = await while_connected(request.receive, answer.aread())
                return Response(content, answer.status_code, headers=headers)
            pieces = answer.aiter_raw()
            first = await while_connected(request.receive, anext(pieces))
            kept = True
            return _Relayed(answer, first, pieces, headers, replica, request.state.request_id)
        except (httpx2.HTTPError, StopAsyncIteration) as error:
            raise _ReplicaLostError from error
        finally:
            if not kept:
                replica.load -= 1


class _Relayed(Response):
    """A stream of a replica. If that ends in the middle, the client gets an error as its last event."""

    def __init__(
        self,
        answer: httpx2.Response,
        first: bytes,
        rest: AsyncIterator[bytes],
        headers: dict[str, str],
        replica: Replica,
        request_id: str,
    ) -> None:
        super().__init__(status_code=answer.status_code, headers=headers)
        del self.headers["content-length"]
        self._answer, self._first, self._rest = answer, first, rest
        self._replica, self._request_id = replica, request_id

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        try:
            async with aclosing(self._answer):
                await while_connected(receive, self._send(send))
        finally:
            self._replica.load -= 1

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _piece(send, self._first)
        try:
            async for piece in self._rest:
                await _piece(send, piece)
        except httpx2.HTTPError:
            logger.warning(
                "replica %d was lost with request %s, in the middle of its stream",
                *(self._replica.number, self._request_id),
            )
            error: BaseModel = ApiError(
                503, "the replica that made this answer has ended; what came before is incomplete"
            ).body()
            await _piece(send, f"\n\ndata: {error.model_dump_json()}\n\ndata: [DONE]\n\n".encode())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _piece(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
