"""Chat completions: `ChatRequest` in, `ChatCompletion` or `ChatChunk`s out. Knows nothing of HTTP."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from opsin.api import ProcessedPrompt
from opsin.config import BeamSearchParams, SamplingParams
from opsin.results import CompletionOutput, RequestOutput
from opsin.server.answers.constraint import constraint
from opsin.server.answers.generation import only_output, outputs, usage
from opsin.server.answers.logprobs import chat_logprobs, prompt_logprobs
from opsin.server.answers.sampling import beam_params, sampling_params
from opsin.server.answers.tool_parser import Pieces, ToolParser, parse_answer
from opsin.server.http.errors import bad_request
from opsin.server.schema.chat import ChatRequest, NamedToolChoice
from opsin.server.schema.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ToolCall,
    Usage,
)
from opsin.server.serving import Serving
from opsin.server.tools import call_grammar, tools_in_use


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A chat ready for the engine."""

    request: ChatRequest
    id: str
    created: int
    started: float
    model: str
    prompt: ProcessedPrompt
    params: SamplingParams
    beams: BeamSearchParams | None
    role: str
    echo: str


class ChatCompletions:
    """Answers chats with one model."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def create(self, request: ChatRequest) -> ChatCompletion:
        """The whole answer.

        Raises:
            ApiError, RequestError: the request cannot be answered.
        """
        chat = await self._prepare(request)
        output = await only_output(self._outputs(chat, finished_only=True))
        return ChatCompletion(
            id=chat.id,
            object="chat.completion",
            created=chat.created,
            model=chat.model,
            choices=[_choice(chat, sample) for sample in output.outputs],
            usage=usage(output),
            prompt_logprobs=prompt_logprobs(output.prompt_logprobs),
        )

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatChunk, None]:
        """The answer as it is made. Whatever is wrong with the request is raised before the first chunk.

        Raises:
            ApiError, RequestError: the request cannot be answered.
        """
        chat = await self._prepare(request)
        options = request.stream_options
        samples = [_SampleStream(chat, index) for index in range(chat.params.n)]
        output = None
        async with aclosing(self._outputs(chat)) as stream:
            async for output in stream:
                in_chunks = usage(output) if options is not None and options.continuous_usage_stats else None
                for sample in samples:
                    for choice in sample.take(output.outputs[sample.index]):
                        yield self._chunk(chat, [choice], in_chunks)
        assert output is not None, "a stream ends with an output or an error"
        if options is not None and options.include_usage:
            yield self._chunk(chat, [], usage(output))

    async def _prepare(self, request: ChatRequest) -> _Prepared:
        serving, started = self._serving, time.monotonic()
        model = serving.check(request.model, task="generate")
        max_tokens = request.max_completion_tokens or request.max_tokens
        if max_tokens is None:
            max_tokens = serving.engine.engine.checkpoint.generation_config.get("max_new_tokens")
        calls = call_grammar(request)
        structured = constraint(request)
        if calls is not None and structured is not None:
            raise bad_request("tool_choice already constrains the answer; leave out the other constraint")
        params = sampling_params(
            request,
            serving,
            max_tokens=max_tokens,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            structured=calls or structured,
        )
        beams = beam_params(request, max_tokens=max_tokens, structured=params.structured)
        if beams is not None and request.logprobs:
            raise bad_request("use_beam_search gives no log-probabilities", "logprobs")
        rendering = request.rendering()
        prompt = await serving.chat_prompt(
            request,
            rendering=rendering,
            options=request.mm_processor_kwargs,
            tools=tools_in_use(request),
            cache_salt=request.cache_salt,
        )
        last = request.messages[-1]
        role = "assistant" if rendering["add_generation_prompt"] else last.role
        echoed = request.echo and role == last.role
        return _Prepared(
            request=request,
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            started=started,
            model=model,
            prompt=prompt,
            params=params,
            beams=beams,
            role=role,
            echo=_text(last.content) if echoed else "",
        )

    def _outputs(
        self, chat: _Prepared, *, finished_only: bool = False
    ) -> AsyncGenerator[RequestOutput, None]:
        return outputs(
            self._serving,
            chat.prompt,
            chat.params,
            request_id=chat.id,
            started=chat.started,
            num_samples=chat.request.n or 1,
            beams=chat.beams,
            finished_only=finished_only,
        )

    def _chunk(self, chat: _Prepared, choices: list[ChatChunkChoice], used: Usage | None) -> ChatChunk:
        chunk = ChatChunk(
            id=chat.id,
            object="chat.completion.chunk",
            created=chat.created,
            model=chat.model,
            choices=choices,
        )
        if chat.request.stream_options is not None:
            chunk.usage = used
        return chunk


@dataclass
class _SampleStream:
    """What of one sample has been sent."""

    chat: _Prepared
    index: int
    parser: ToolParser | None = field(init=False)
    num_chars: int = 0
    num_tokens: int = 0
    begun: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        has_tools = bool(tools_in_use(self.chat.request))
        self.parser = ToolParser(_max_calls(self.chat.request)) if has_tools else None

    def take(self, sample: CompletionOutput) -> list[ChatChunkChoice]:
        """The chunks that bring the client up to date."""
        if self.ended:
            return []
        choices = []
        if not self.begun:
            self.begun = True
            first = ChatDelta(role=self.chat.role, content=self.chat.echo)
            choices.append(ChatChunkChoice(index=self.index, delta=first, logprobs=None, finish_reason=None))
        pieces = self._pieces(sample)
        logprobs = self._logprobs(sample)
        reason: str | None = None
        if sample.finish_reason is not None:
            self.ended = True
            num_calls = self.parser.num_calls if self.parser else 0
            reason = _finish_reason(self.chat.request, sample.finish_reason, num_calls)
        if pieces.content or pieces.calls or logprobs is not None or reason is not None:
            delta = ChatDelta()
            if pieces.content:
                delta.content = pieces.content
            if pieces.calls:
                delta.tool_calls = pieces.calls
            choice = ChatChunkChoice(index=self.index, delta=delta, logprobs=logprobs, finish_reason=reason)
            if reason is not None:
                choice.stop_reason = sample.stop_reason
            choices.append(choice)
        return choices

    def _pieces(self, sample: CompletionOutput) -> Pieces:
        new = sample.text[self.num_chars :]
        self.num_chars = len(sample.text)
        if self.parser is None:
            return Pieces(new)
        pieces = self.parser.push(new)
        if sample.finish_reason is not None:
            rest = self.parser.flush()
            pieces = Pieces(pieces.content + rest.content, pieces.calls + rest.calls)
        return pieces

    def _logprobs(self, sample: CompletionOutput) -> ChatLogprobs | None:
        if not self.chat.request.logprobs or sample.logprobs is None:
            return None
        new = sample.logprobs[self.num_tokens :]
        self.num_tokens = len(sample.logprobs)
        return chat_logprobs(new, self.chat.request.top_logprobs or 0) if new else None


def _choice(chat: _Prepared, sample: CompletionOutput) -> ChatChoice:
    request = chat.request
    content, calls = chat.echo + sample.text, list[ToolCall]()
    if tools_in_use(request):
        content, calls = parse_answer(sample.text, _max_calls(request))
        content = chat.echo + content
    message = AssistantMessage(role=chat.role, content=content or (None if calls else ""))
    if calls:
        message.tool_calls = calls
    wants_logprobs = request.logprobs and sample.logprobs is not None
    return ChatChoice(
        index=sample.index,
        message=message,
        logprobs=chat_logprobs(sample.logprobs or (), request.top_logprobs or 0) if wants_logprobs else None,
        finish_reason=_finish_reason(request, sample.finish_reason or "abort", len(calls)),
        stop_reason=sample.stop_reason,
    )


def _finish_reason(request: ChatRequest, reason: str, num_calls: int) -> str:
    """OpenAI says "tool_calls" where the model chose to call, and "stop" where it was told what to call."""
    chosen = num_calls > 0 and not isinstance(request.tool_choice, NamedToolChoice)
    return "tool_calls" if chosen and reason == "stop" else reason


def _max_calls(request: ChatRequest) -> int | None:
    return 1 if request.parallel_tool_calls is False else None


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content or () if part.type in ("text", "input_text"))
