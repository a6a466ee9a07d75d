"""The FastAPI application: which path leads where. What happens there is in the modules it names."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import cached_property
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import opsin
from opsin.errors import OpsinError
from opsin.server.answers.chat import ChatCompletions
from opsin.server.answers.completions import Completions
from opsin.server.answers.embeddings import Embeddings
from opsin.server.answers.tokens import Tokenization
from opsin.server.engine_host import EngineHost
from opsin.server.fetch.fetcher import MediaFetcher
from opsin.server.http.admission import Admission
from opsin.server.http.body import read_body
from opsin.server.http.disconnect import while_connected
from opsin.server.http.errors import ApiError, ErrorBody
from opsin.server.http.event_stream import EventStream
from opsin.server.http.middleware import OPEN_PATHS, Admit, ApiKeys, RequestLog, RootPath
from opsin.server.metrics import Metrics
from opsin.server.schema.chat import ChatRequest
from opsin.server.schema.completion import CompletionRequest
from opsin.server.schema.embedding import EmbeddingRequest
from opsin.server.schema.responses import (
    ChatCompletion,
    Completion,
    EmbeddingList,
    ModelCard,
    ModelList,
    Status,
    Text,
    Tokens,
    Version,
)
from opsin.server.schema.tokens import DetokenizeRequest, TokenizeRequest
from opsin.server.serving import Serving
from opsin.server.settings import ServerSettings
from opsin.server.ui import UI_PATHS, mount_ui

M = TypeVar("M", bound=BaseModel)

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
"""Path -> model of the request's body."""


class App:
    """The application and what it holds.

    Attributes:
        api: the ASGI application.
        host: of the engine.
        admission: counts requests.
    """

    def __init__(self, host: EngineHost, settings: ServerSettings) -> None:
        self.host = host
        self.admission = Admission(host.config.max_num_seqs + settings.limits.max_waiting)
        self._settings = settings
        self._metrics = Metrics(_names(host, settings)[0])
        self._fetcher = MediaFetcher(settings.fetch, run_blocking=self._run_blocking)
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
        if settings.ui:
            mount_ui(self.api)
        self._add_middleware()

    async def aclose(self) -> None:
        """Close what is open; the engine, too."""
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
        if settings.allowed_origins:
            self.api.add_middleware(
                CORSMiddleware,
                allow_origins=list(settings.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        self.api.add_middleware(RootPath, root_path=settings.root_path)
        self.api.add_middleware(RequestLog, metrics=self._metrics)

    def _add_routes(self) -> None:
        def route(
            method: str, path: str, answer: Callable[..., Awaitable[Response]], model: type[BaseModel]
        ) -> None:
            extra: dict[str, Any] | None = None
            if path in _BODIES:
                reference = {"$ref": f"#/components/schemas/{_BODIES[path].__name__}"}
                extra = {
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": reference}},
                    }
                }
            self.api.add_api_route(
                path,
                answer,
                methods=[method],
                response_model=None,
                responses={200: {"model": model}},
                openapi_extra=extra,
            )

        route("GET", "/health", self.health, Status)
        route("GET", "/ready", self.ready, Status)
        route("GET", "/version", self.version, Version)
        route("GET", "/v1/models", self.models, ModelList)
        route("POST", "/v1/chat/completions", self.chat_completions, ChatCompletion)
        route("POST", "/v1/completions", self.completions, Completion)
        route("POST", "/v1/embeddings", self.embeddings, EmbeddingList)
        route("POST", "/tokenize", self.tokenize, Tokens)
        route("POST", "/detokenize", self.detokenize, Text)
        self.api.add_api_route(
            "/metrics",
            self.metrics,
            methods=["GET"],
            response_model=None,
            responses={200: {"content": {"text/plain": {}}}},
        )

    def _openapi(self) -> dict[str, Any]:
        if self.api.openapi_schema is None:
            schema = get_openapi(title=self.api.title, version=self.api.version, routes=self.api.routes)
            _, bodies = models_json_schema(
                [(model, "validation") for model in _BODIES.values()],
                ref_template="#/components/schemas/{model}",
            )
            schema["components"]["schemas"].update(bodies["$defs"])
            if self._settings.api_key:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"key": []}]
            self.api.openapi_schema = schema
        return self.api.openapi_schema

    @cached_property
    def _serving(self) -> Serving:
        """Raises ApiError 503 until the engine is there."""
        return Serving(
            engine=self.host.engine(),
            settings=self._settings,
            fetcher=self._fetcher,
            metrics=self._metrics,
        )

    def _ready(self) -> Serving:
        self.host.engine()  # it may have failed since
        return self._serving

    async def _run_blocking(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self.host.engine().in_pool(function, *arguments)

    # ---- about the server ---------------------------------------------------------------------

    async def health(self) -> Response:
        """Whether the process lives; it may still be loading."""
        if self.host.failure is not None:
            self.host.engine()
        return _json(Status(status="ok"))

    async def ready(self) -> Response:
        """Whether requests are answered."""
        self.admission.check()
        self._ready()
        return _json(Status(status="ready"))

    async def version(self) -> Response:
        """The server's version."""
        return _json(Version(version=opsin.__version__))

    async def metrics(self) -> Response:
        """Metrics in Prometheus' text format."""
        try:
            stats = await self.host.engine().stats()
        except OpsinError:  # it is loading, or has failed
            stats = None
        return Response(self._metrics.text(stats), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        """The served models."""
        serving = self._ready()
        info = serving.info
        cards = [
            ModelCard(
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
        return _json(ModelList(object="list", data=cards))

    # ---- work ---------------------------------------------------------------------------------

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation with text, pictures and videos."""
        serving, body = await self._take(request, ChatRequest)
        chat = ChatCompletions(serving)
        if body.stream:
            return await _streamed(request, chat.stream(body))
        return _json(await while_connected(request.receive, chat.create(body)))

    async def completions(self, request: Request) -> Response:
        """Go on with plain text."""
        serving, body = await self._take(request, CompletionRequest)
        completions = Completions(serving)
        if body.stream:
            return await _streamed(request, completions.stream(body))
        return _json(await while_connected(request.receive, completions.create(body)))

    async def embeddings(self, request: Request) -> Response:
        """Turn texts, or messages with pictures, into vectors."""
        serving, body = await self._take(request, EmbeddingRequest)
        return _json(await while_connected(request.receive, Embeddings(serving).create(body)))

    async def tokenize(self, request: Request) -> Response:
        """Count and show the tokens of a text or a conversation, pictures expanded."""
        serving, body = await self._take(request, TokenizeRequest)
        return _json(await while_connected(request.receive, Tokenization(serving).tokenize(body)))

    async def detokenize(self, request: Request) -> Response:
        """Turn token ids back into text."""
        serving, body = await self._take(request, DetokenizeRequest)
        return _json(await while_connected(request.receive, Tokenization(serving).detokenize(body)))

    async def _take(self, request: Request, model: type[M]) -> tuple[Serving, M]:
        """The body is read last: a server that cannot answer need not receive pictures first."""
        serving = self._ready()
        return serving, await read_body(request, model, self._settings.limits.max_body_bytes)


async def _streamed(request: Request, chunks: AsyncGenerator[Any, None]) -> Response:
    """A response that begins once the first chunk is there: until then, errors have their own status."""
    try:
        first = await while_connected(request.receive, anext(chunks))
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(first, chunks, request.state.request_id)


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(exclude_unset=True), media_type="application/json")


def _names(host: EngineHost, settings: ServerSettings) -> Sequence[str]:
    return settings.served_model_name or (host.config.model,)


async def _as_error_body(request: Request, error: Exception) -> Response:
    """Starlette's own errors: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    response = ApiError(HTTPStatus(error.status_code), error.detail).response()
    response.headers.update(error.headers or {})
    return response
