"""A loaded model as requests see it: its names, its limits, and the way from messages to a prompt."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any

from opsin.api import Modality, ProcessedPrompt
from opsin.async_engine import AsyncEngine
from opsin.server.fetch.fetcher import MediaFetcher
from opsin.server.http.errors import ApiError, bad_request
from opsin.server.metrics import Metrics
from opsin.server.schema.chat import ChatFields, Message, Tool
from opsin.server.settings import ServerSettings
from opsin.server.tools import with_tools

_MODALITY_OF: Mapping[str, Modality] = {
    "image_url": "image",
    "input_image": "image",
    "image": "image",
    "image_embeds": "image",
    "video_url": "video",
    "video": "video",
    "video_embeds": "video",
}


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What every route works with.

    Attributes:
        engine: runs the model.
        settings: of the server.
        fetcher: gets what requests name by URL.
        metrics: counts.
        created: seconds since 1970 at which the model was loaded.
    """

    engine: AsyncEngine
    settings: ServerSettings
    fetcher: MediaFetcher
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> Sequence[str]:
        """Names of the model, its own first."""
        return self.settings.served_model_names or (self.engine.engine.config.model,)

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.engine.engine.resolved.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.engine.engine.executor.model.vocab_size

    def check(self, model: str | None, *, task: str | None = None) -> str:
        """The name to answer under.

        Args:
            model: as the request names it; None: whatever is served.
            task: what the route needs of the server; None: any.

        Raises:
            ApiError: 404 for another model; 400 for a server with another task.
        """
        if model is not None and model not in self.names:
            listed = ", ".join(self.names)
            raise ApiError(
                HTTPStatus.NOT_FOUND, f"this model is not served here; served: {listed}", param="model"
            )
        own = self.engine.engine.config.task
        if task is not None and task != own:
            flag = {"generate": "--task generate", "embed": "--task embedding"}[task]
            does = {"generate": "answers", "embed": "embeddings"}[own]
            raise bad_request(f"this server makes {does}; a server started with {flag} would do this")
        return model or self.names[0]

    async def chat_prompt(
        self,
        request: ChatFields,
        *,
        rendering: Mapping[str, Any],
        options: Mapping[str, Any] | None,
        tools: Sequence[Tool] = (),
        cache_salt: str | None = None,
        min_new_tokens: int = 1,
    ) -> ProcessedPrompt:
        """Messages -> prompt: fetched without waiting on a thread, decoded and rendered in the pool.

        Args:
            request: with ``messages``.
            rendering: for `ChatRenderer.render`.
            options: ``mm_processor_kwargs``.
            tools: that the model is told of.
            cache_salt: keeps the prompt's cached prefix apart.
            min_new_tokens: room the context must leave.

        Raises:
            ApiError, RequestError: the messages cannot be used.
        """
        started = time.monotonic()
        limits = self.engine.engine.processor.limits
        self._check_counts(request, limits)
        template = self._own_template(request)
        messages, for_template = with_tools(
            [message.model_dump(exclude_none=True) for message in request.messages],
            tools,
            template or self.engine.engine.renderer.chat_template,
        )
        messages = await self.fetcher.resolve(messages, limits)
        render = partial(
            self.engine.engine.renderer.render,
            messages,
            tools=for_template,
            chat_template=template,
            **rendering,
        )
        prompt = await self.engine.in_pool(self._rendered, render, options, cache_salt, min_new_tokens)
        self.metrics.preprocessed(time.monotonic() - started)
        return prompt

    async def plain_prompt(
        self,
        prompt: str | Sequence[int],
        *,
        truncate: int | None = None,
        cache_salt: str | None = None,
        min_new_tokens: int = 1,
    ) -> ProcessedPrompt:
        """A text, or token ids, -> prompt; of which the last ``truncate`` tokens are kept (-1: what fits).

        Raises:
            RequestError: it cannot be used.
        """
        started = time.monotonic()
        processed = await self.engine.in_pool(self._plain, prompt, truncate, cache_salt, min_new_tokens)
        self.metrics.preprocessed(time.monotonic() - started)
        return processed

    def _plain(
        self, prompt: str | Sequence[int], truncate: int | None, cache_salt: str | None, min_new_tokens: int
    ) -> ProcessedPrompt:
        if truncate == 0 or (truncate or 0) > self.max_model_len:
            raise bad_request(
                f"expected -1, or 1 to {self.max_model_len} (the context)", "truncate_prompt_tokens"
            )
        if truncate is not None:
            ids = self.engine.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            prompt = ids[-(self.max_model_len - min_new_tokens if truncate == -1 else truncate) :]
        key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
        return self.engine.engine.processor.process(
            {key: prompt, "cache_salt": cache_salt}, min_new_tokens=min_new_tokens
        )

    def _rendered(
        self,
        render: partial[dict[str, Any]],
        options: Mapping[str, Any] | None,
        cache_salt: str | None,
        min_new_tokens: int,
    ) -> ProcessedPrompt:
        rendered = {**render(), "mm_processor_kwargs": options, "cache_salt": cache_salt}
        return self.engine.engine.processor.process(rendered, min_new_tokens=min_new_tokens)

    def _own_template(self, request: ChatFields) -> str | None:
        if request.chat_template is not None and not self.settings.trust_request_chat_template:
            raise bad_request(
                "requests may not bring a chat template here; --trust-request-chat-template would allow it",
                "chat_template",
            )
        return request.chat_template

    def _check_counts(self, request: ChatFields, limits: Mapping[Modality, int]) -> None:
        most = self.settings.limits.parts
        if request.num_parts > most:
            raise bad_request(f"at most {most} content parts are accepted (--max-parts)", "messages")
        for modality, count in _num_items(request.messages).items():
            limit = limits.get(modality)
            if limit is not None and count > limit:
                raise bad_request(
                    f"At most {limit} {modality}(s) may be provided in one request. This one has {count}, "
                    "those of earlier messages included; the server would take them with "
                    f"--limit-mm-per-prompt {modality}={count}",
                    "messages",
                )


def _num_items(messages: Sequence[Message]) -> Counter[Modality]:
    return Counter(
        modality
        for message in messages
        if isinstance(message.content, list)
        for part in message.content
        if (modality := _MODALITY_OF.get(part.type)) is not None
    )
