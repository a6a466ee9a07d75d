"""The FastAPI application: which path leads where. What happens there is in the modules it names."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import opsin
from opsin.errors import OpsinError
from opsin.fetch.fetcher import MediaFetcher
from opsin.server.answers.chat import ChatCompletions
from opsin.server.answers.completions import Completions
from opsin.server.answers.embeddings import Embeddings
from opsin.server.answers.messages_api import AnthropicMessages, Block
from opsin.server.answers.responses_api import Item, Responses, ResponseStore
from opsin.server.answers.scores import Scores
from opsin.server.answers.tokens import Tokenization
from opsin.server.batch.api import BatchApi
from opsin.server.engine_host import Host
from opsin.server.http.admission import Admission
from opsin.server.http.body import read_body
from opsin.server.http.disconnect import ClientGone, while_connected
from opsin.server.http.errors import ApiError, ErrorBody, api_error
from opsin.server.http.event_stream import EventStream, NamedEventStream
from opsin.server.http.middleware import OPEN_PATHS, Admit, ApiKeys, KnownHosts, RequestLog, RootPath
from opsin.server.metrics import PREFIX, Metrics
from opsin.server.schema import responses
from opsin.server.schema.chat import ChatRequest
from opsin.server.schema.messages_api import CountTokensRequest, MessagesRequest
from opsin.server.schema.prompts import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
    TokenizeRequest,
)
from opsin.server.schema.responses_api import ResponsesRequest
from opsin.server.serving import Serving
from opsin.server.settings import ServerSettings
from opsin.server.ui import UI_PATHS, mount_ui

M = TypeVar("M", bound=BaseModel)

_SCHEMA = "#/components/schemas/{model}"


_ALIASES: Mapping[str, Sequence[str]] = {
    "/v1/chat/completions": ("/chat/completions",),
    "/v1/completions": ("/completions",),
    "/v1/embeddings": ("/embeddings",),
    "/v1/models": ("/models",),
    "/v1/score": ("/score",),
    "/v1/rerank": ("/rerank", "/v2/rerank"),
}
"""Where clients of other servers look."""


class _Route(NamedTuple):
    """A path: its endpoint, and the models of its answer (None: plain text) and body (None: it is a GET)."""

    path: str
    endpoint: Callable[..., Awaitable[Response]]
    answer: type[BaseModel] | None
    body: type[BaseModel] | None = None


class App:
    """The application and what it holds.

    Attributes:
        api: the ASGI application.
        host: holder of the engine.
        limits: limits of requests and connections.
        admission: counter of requests.
        batches: routes of jobs; None where they are off.
    """

    def __init__(self, host: Host, settings: ServerSettings, *, on_loopback: bool = False) -> None:
        """``on_loopback``: whether only this machine reaches it, so that it may go without a key."""
        self.host = host
        self._on_loopback = on_loopback
        self.limits = limits = settings.limits
        self.admission = Admission(host.config.max_num_seqs + limits.max_waiting, limits.max_receiving_bytes)
        self._settings = settings
        self._metrics = Metrics(settings.names_of(host.config)[0])
        self._serving: Serving | None = None
        self._responses = ResponseStore(settings.response_store)
        self._fetcher = MediaFetcher(settings.fetch, run_blocking=lambda *work: host.engine().in_pool(*work))
        self.api = FastAPI(
            title="opsin",
            version=opsin.__version__,
            docs_url=None,  # the pages would load scripts from elsewhere
            redoc_url=None,
            responses={"default": {"model": ErrorBody}},
        )
        self.api.openapi = self._openapi  # type: ignore[method-assign]
        self.api.add_exception_handler(HTTPException, _as_error_body)
        self._add_routes()
        self.batches: BatchApi | None = None
        if settings.files_dir is not None:
            self.batches = BatchApi(settings.files_dir, settings, self._ready)
            self.batches.add_to(self.api)
        if settings.ui:
            mount_ui(self.api)
        self._add_middleware()

    async def aclose(self) -> None:
        """Close connections and the engine."""
        if self.batches is not None:
            await self.batches.aclose()
        await self._fetcher.aclose()
        self.host.close()

    # ---- set-up -------------------------------------------------------------------------------

    def _add_middleware(self) -> None:
        """The last one added is the first one a request meets."""
        settings = self._settings
        self.api.add_middleware(
            Admit, admission=self.admission, open_paths=OPEN_PATHS | {"/ready", "/metrics"}
        )
        if settings.api_key:
            open_paths = OPEN_PATHS | UI_PATHS if settings.ui else OPEN_PATHS
            self.api.add_middleware(ApiKeys, keys=settings.api_key, open_paths=open_paths)
        elif self._on_loopback:
            self.api.add_middleware(KnownHosts, names=settings.allowed_hosts)
        if settings.allowed_origins:
            self.api.add_middleware(
                CORSMiddleware,
                allow_origins=list(settings.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # clients send headers of their own, such as x-stainless-os
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        self.api.add_middleware(RootPath, root_path=settings.root_path)
        self.api.add_middleware(RequestLog, metrics=self._metrics)

    @property
    def _routes(self) -> Iterator[_Route]:
        yield _Route("/health", self.health, responses.Status)
        yield _Route("/ready", self.ready, responses.Status)
        yield _Route("/version", self.version, responses.Version)
        yield _Route("/v1/models", self.models, responses.ModelList)
        yield _Route("/v1/chat/completions", self.chat_completions, responses.ChatCompletion, ChatRequest)
        yield _Route("/v1/completions", self.completions, responses.Completion, CompletionRequest)
        yield _Route("/v1/embeddings", self.embeddings, responses.EmbeddingList, EmbeddingRequest)
        yield _Route("/v1/models/{model:path}", self.model, responses.ModelCard)
        yield _Route("/v1/score", self.score, responses.ScoreList, ScoreRequest)
        yield _Route("/v1/rerank", self.rerank, responses.Ranking, RerankRequest)
        yield _Route("/pooling", self.pooling, responses.PooledList, PoolingRequest)
        yield _Route("/ping", self.health, responses.Status)
        yield _Route("/load", self.load, responses.Load)
        yield _Route("/v1/responses", self.responses, Item, ResponsesRequest)
        yield _Route("/v1/responses/{response_id}", self.response, Item)
        yield _Route("/v1/messages", self.messages, Block, MessagesRequest)
        yield _Route("/v1/messages/count_tokens", self.count_tokens, Block, CountTokensRequest)
        yield _Route("/tokenize", self.tokenize, responses.Tokens, TokenizeRequest)
        yield _Route("/detokenize", self.detokenize, responses.Text, DetokenizeRequest)
        yield _Route("/metrics", self.metrics, None)

    def _add_routes(self) -> None:
        for path, endpoint, answer, body in self._routes:
            extra: dict[str, Any] | None = None
            if body is not None:
                content = {"application/json": {"schema": {"$ref": _SCHEMA.format(model=body.__name__)}}}
                extra = {"requestBody": {"required": True, "content": content}}
            methods = ["GET"] if body is None else ["POST"]
            told: dict[str, Any] = {"content": {"text/plain": {}}} if answer is None else {"model": answer}
            self.api.add_api_route(
                path,
                endpoint,
                methods=methods,
                response_model=None,
                responses={200: told},
                openapi_extra=extra,
            )
            if body is None:  # apart: in one route they would be two operations of one name
                self.api.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
                methods = ["GET", "HEAD"]
            for alias in _ALIASES.get(path, ()):
                self.api.add_api_route(alias, endpoint, methods=methods, include_in_schema=False)

    def _openapi(self) -> dict[str, Any]:
        if self.api.openapi_schema is None:
            schema = get_openapi(title=self.api.title, version=self.api.version, routes=self.api.routes)
            _, bodies = models_json_schema(
                [(route.body, "validation") for route in self._routes if route.body is not None],
                ref_template=_SCHEMA,
            )
            schema["components"]["schemas"].update(bodies["$defs"])
            if self._settings.api_key:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"key": []}]
            self.api.openapi_schema = schema
        return self.api.openapi_schema

    def _ready(self) -> Serving:
        """Raises ApiError 503 until the engine is there, and once it has failed."""
        engine = self.host.engine()
        if self._serving is None:
            self._serving = Serving(
                engine=engine, settings=self._settings, fetcher=self._fetcher, metrics=self._metrics
            )
        return self._serving

    # ---- about the server ---------------------------------------------------------------------

    async def health(self) -> Response:
        """Whether the process lives; it may still be loading."""
        if self.host.failure is not None:
            self.host.engine()
        return as_json(responses.Status(status="ok"))

    async def ready(self) -> Response:
        """Whether requests are answered."""
        self.admission.check()
        self._ready()
        return as_json(responses.Status(status="ready"))

    async def version(self) -> Response:
        """The server's version."""
        return as_json(responses.Version(version=opsin.__version__))

    async def metrics(self) -> Response:
        """Metrics in Prometheus' text format."""
        try:
            stats = await self.host.engine().stats()
        except OpsinError:  # it is loading, or has failed
            stats = None
        return self._told(self._metrics.text(stats))

    def _told(self, text: bytes) -> Response:
        if self._settings.vllm_metric_names:
            text += text.replace(PREFIX.encode(), b"vllm:")
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def load(self) -> Response:
        """How many requests there are at the moment."""
        return as_json(responses.Load(server_load=self.admission.num_requests))

    async def model(self, model: str) -> Response:
        """One served model."""
        serving = self._ready()
        serving.check(model)
        return as_json(next(card for card in self._cards(serving) if card.id == model))

    async def models(self) -> Response:
        """The served models."""
        return as_json(responses.ModelList(object="list", data=self._cards(self._ready())))

    @staticmethod
    def _cards(serving: Serving) -> list[responses.ModelCard]:
        info = serving.info
        return [
            responses.ModelCard(
                id=name,
                object="model",
                created=serving.created,
                owned_by="opsin",
                root=info.config.model,
                parent=None,
                max_model_len=info.max_model_len,
                task=info.config.task,
                modalities=["text", *sorted(serving.frontend.processor.mappers)],
            )
            for name in serving.names
        ]

    # ---- work ---------------------------------------------------------------------------------

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation with text, pictures and videos."""
        serving, body = await self._take(request, ChatRequest)
        chat = ChatCompletions(serving)
        return await _answer(request, chat.stream(body) if body.stream else chat.create(body))

    async def completions(self, request: Request) -> Response:
        """Go on with plain text."""
        serving, body = await self._take(request, CompletionRequest)
        completions = Completions(serving)
        return await _answer(request, completions.stream(body) if body.stream else completions.create(body))

    async def embeddings(self, request: Request) -> Response:
        """Turn texts, or messages with pictures, into vectors."""
        serving, body = await self._take(request, EmbeddingRequest)
        return await _answer(request, Embeddings(serving).create(body))

    async def score(self, request: Request) -> Response:
        """Say how similar texts are."""
        serving, body = await self._take(request, ScoreRequest)
        return await _answer(request, Scores(serving).score(body))

    async def rerank(self, request: Request) -> Response:
        """Put documents in the order of their similarity to a query."""
        serving, body = await self._take(request, RerankRequest)
        return await _answer(request, Scores(serving).rerank(body))

    async def pooling(self, request: Request) -> Response:
        """Turn texts into vectors, in vLLM's form."""
        serving, body = await self._take(request, PoolingRequest)
        return await _answer(request, Scores(serving).pool(body))

    async def responses(self, request: Request) -> Response:
        """Answer items with items."""
        serving, body = await self._take(request, ResponsesRequest)
        made = Responses(serving, self._responses)
        work = made.stream(body) if body.stream else made.create(body)
        return await _answer(request, work, NamedEventStream)

    async def response(self, response_id: str) -> Response:
        """A response that is kept."""
        return as_json(Item(self._responses.find(response_id)[0]))

    async def messages(self, request: Request) -> Response:
        """Answer a conversation, in Anthropic's words."""
        return await self._in_anthropics_words(request, self._messages(request))

    async def count_tokens(self, request: Request) -> Response:
        """Count the tokens of a conversation, in Anthropic's words."""
        return await self._in_anthropics_words(request, self._count_tokens(request))

    async def _messages(self, request: Request) -> Response:
        serving, body = await self._take(request, MessagesRequest)
        made = AnthropicMessages(serving)
        work = made.stream(body) if body.stream else made.create(body)
        return await _answer(request, work, NamedEventStream)

    async def _count_tokens(self, request: Request) -> Response:
        serving, body = await self._take(request, CountTokensRequest)
        return await _answer(request, AnthropicMessages(serving).count(body))

    @staticmethod
    async def _in_anthropics_words(request: Request, work: Awaitable[Response]) -> Response:
        """Errors, too."""
        try:
            return await work
        except ClientGone:
            raise
        except Exception as error:
            answer = api_error(error, request.state.request_id)
            if answer.status == 500:
                raise
            kind = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
            kind |= {429: "rate_limit_error", 503: "overloaded_error"}
            detail = {"type": kind.get(answer.status, "invalid_request_error"), "message": str(answer)}
            return JSONResponse({"type": "error", "error": detail}, answer.status)

    async def tokenize(self, request: Request) -> Response:
        """Count and show the tokens of a text or a conversation, pictures expanded."""
        serving, body = await self._take(request, TokenizeRequest)
        return await _answer(request, Tokenization(serving).tokenize(body))

    async def detokenize(self, request: Request) -> Response:
        """Turn token ids back into text."""
        serving, body = await self._take(request, DetokenizeRequest)
        return await _answer(request, Tokenization(serving).detokenize(body))

    async def _take(self, request: Request, model: type[M]) -> tuple[Serving, M]:
        """The body is read last: a server that cannot answer need not receive pictures first."""
        serving = self._ready()
        limits = self._settings.limits
        body = await read_body(
            request,
            model,
            max_bytes=limits.max_body_bytes,
            timeout_s=limits.receive_timeout,
            ignore_unknown=limits.unknown_fields == "ignore",
        )
        return serving, body


async def _answer(
    request: Request,
    work: Coroutine[Any, Any, BaseModel] | AsyncGenerator[BaseModel, None],
    stream: type[EventStream] = EventStream,
) -> Response:
    """The answer; a stream begins once its first chunk is there: until then, errors have their own status."""
    if not isinstance(work, AsyncGenerator):
        return as_json(await while_connected(request.receive, work))
    try:
        first = await while_connected(request.receive, anext(work))
    except BaseException:
        await work.aclose()
        raise
    return stream(first, work, request.state.request_id)


def as_json(model: BaseModel) -> Response:
    """A model as the body of an answer."""
    return Response(model.model_dump_json(exclude_unset=True), media_type="application/json")


async def _as_error_body(_: Request, error: Exception) -> Response:
    """Starlette's own errors: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, error.detail).response()
    response.headers.update(error.headers or {})
    return response
