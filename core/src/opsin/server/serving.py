"""A loaded model as requests see it: its names, its limits, and how messages become a prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from opsin.api import ProcessedPrompt
from opsin.async_engine import AsyncEngine
from opsin.engine.engine import EngineInfo
from opsin.errors import MediaError
from opsin.fetch.fetcher import MediaFetcher
from opsin.fetch.gather import all_of
from opsin.inputs.chat import ChatOptions
from opsin.inputs.frontend import Frontend
from opsin.server.http.errors import ApiError, bad_request
from opsin.server.metrics import Metrics
from opsin.server.schema.chat import ChatFields
from opsin.server.schema.prompts import PlainPrompt, Prompts
from opsin.server.settings import ServerSettings


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What every route works with.

    Attributes:
        engine: what runs the model.
        settings: settings of the server.
        fetcher: source of what requests name by URL.
        metrics: counters and histograms.
        created: seconds since 1970 at which the model was loaded.
    """

    engine: AsyncEngine
    settings: ServerSettings
    fetcher: MediaFetcher
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine that do not change."""
        return self.engine.info

    @property
    def frontend(self) -> Frontend:
        """What makes prompts of text and conversations."""
        return self.engine.frontend

    @property
    def names(self) -> Sequence[str]:
        """Names of the model; answers carry the first one."""
        return self.settings.names_of(self.info.config)

    def check(self, model: str | None, *, task: str | None = None) -> str:
        """The name to answer under.

        Args:
            model: as the request names it; None: whatever is served.
            task: what the route needs of the server; None: any.

        Raises:
            ApiError: 404 for another model; 400 for a server with another task.
        """
        if model is not None and model not in self.names and not self.settings.any_model_name:
            listed = ", ".join(self.names)
            raise ApiError(404, f"this model is not served here; served: {listed}", param="model")
        own = self.info.config.task
        if task is not None and task != own:
            flag = {"generate": "--task generate", "embed": "--task embedding"}[task]
            does = {"generate": "answers", "embed": "embeddings"}[own]
            raise bad_request(f"this server makes {does}; a server started with {flag} would do this")
        return model or self.names[0]

    async def chat_prompt(
        self, request: ChatFields, options: ChatOptions, *, min_new_tokens: int = 1
    ) -> ProcessedPrompt:
        """Messages -> prompt. URLs are fetched on the event loop; the rest happens in the pool.

        Args:
            request: with ``messages``.
            options: how they become a prompt.
            min_new_tokens: room the context must leave.

        Raises:
            ApiError, RequestError: the messages cannot be used.
        """
        started = time.monotonic()
        if options.chat_template is not None and not self.settings.trust_request_chat_template:
            raise bad_request(
                "requests may not bring a chat template here; --trust-request-chat-template would allow it",
                "chat_template",
            )
        try:
            conversation = self.frontend.conversation(request.plain_messages())
        except MediaError as error:
            raise bad_request(str(error), "messages") from None
        most = self.settings.limits.max_parts
        if sum(len(message.parts) for message in conversation.messages) > most:
            raise bad_request(f"at most {most} content parts are accepted (--max-parts)", "messages")
        conversation = await self.fetcher.resolve(conversation)
        prepare = self.engine.prepare if conversation.media else self.engine.in_pool
        prompt = await prepare(self.frontend.chat, conversation, options, min_new_tokens=min_new_tokens)
        self.metrics.preprocessed(time.monotonic() - started)
        return prompt

    def inputs(self, given: Prompts, field: str) -> list[PlainPrompt]:
        """One prompt or several -> a list.

        Args:
            given: the value of the request's field.
            field: its name.

        Raises:
            ApiError: there are more than --max-inputs.
        """
        one = isinstance(given, str) or isinstance(given[0], int)
        prompts = cast(list[PlainPrompt], [given] if one else given)
        most = self.settings.limits.max_inputs
        if len(prompts) > most:
            raise bad_request(f"at most {most} {field}s are accepted (--max-inputs)", field)
        return prompts

    async def plain_prompts(
        self,
        prompts: Sequence[PlainPrompt],
        *,
        truncate: int | None,
        cache_salt: str | None,
        min_new_tokens: int = 1,
    ) -> list[ProcessedPrompt]:
        """Texts or token ids -> prompts.

        Args:
            prompts: what to process.
            truncate: last tokens to keep; -1: what fits; None: all.
            cache_salt: keeps cached blocks from other requests.
            min_new_tokens: room the context must leave.

        Raises:
            RequestError: one of them cannot be used.
        """
        longest = self.info.max_model_len

        def process(prompt: PlainPrompt) -> ProcessedPrompt:
            if truncate == 0 or (truncate or 0) > longest:
                raise bad_request(f"expected -1, or 1 to {longest} (the context)", "truncate_prompt_tokens")
            key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
            return self.frontend.processor.process(
                {key: prompt, "cache_salt": cache_salt}, min_new_tokens=min_new_tokens, truncate=truncate
            )

        async def timed(prompt: PlainPrompt) -> ProcessedPrompt:
            started = time.monotonic()
            processed = await self.engine.in_pool(process, prompt)
            self.metrics.preprocessed(time.monotonic() - started)
            return processed

        return await all_of(map(timed, prompts))
