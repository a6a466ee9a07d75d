"""Chat completions: `ChatRequest` in, `ChatCompletion` or `ChatChunk`s out. Knows nothing of HTTP."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opsin.api import ToolFormat, ToolParser, ToolPieces
from opsin.results import CompletionOutput, RequestOutput
from opsin.server.answers.generation import Job, Sent, streamed, usage
from opsin.server.answers.logprobs import chat_logprobs, prompt_logprobs
from opsin.server.answers.sampling import decoding
from opsin.server.answers.tools import call_grammar, deltas, max_calls, parse_answer, tools_in_use
from opsin.server.http.errors import bad_request
from opsin.server.schema.chat import ChatRequest, NamedToolChoice
from opsin.server.schema.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ToolCall,
)
from opsin.server.serving import Serving


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
        [output] = await chat.finished()
        answer = ChatCompletion(
            id=chat.answer_id,
            object="chat.completion",
            created=chat.created,
            model=chat.model,
            system_fingerprint=self._serving.info.fingerprint,
            choices=[chat.choice(sample) for sample in output.outputs],
            usage=usage(output),
            prompt_logprobs=prompt_logprobs(output.prompt_logprobs),
        )
        if request.return_token_ids:
            answer.prompt_token_ids = list(output.prompt_token_ids)
        return answer

    def stream(self, request: ChatRequest) -> AsyncGenerator[ChatChunk, None]:
        """The answer as it is made. Whatever is wrong with the request is raised before the first chunk."""
        return streamed(lambda: self._prepare(request))

    async def _prepare(self, request: ChatRequest) -> _Chat:
        serving, started = self._serving, time.monotonic()
        model = serving.check(request.model, task="generate")
        max_tokens = request.max_completion_tokens or request.max_tokens
        if max_tokens is None:
            max_tokens = serving.info.generation_config.get("max_new_tokens")
        tools = tools_in_use(request)
        form = serving.frontend.tool_format if tools else None
        if tools and form is None:
            raise bad_request(
                "this model's family declares no form of tool calls; leave tools out, or start the server "
                "with --tool-call-parser hermes if the model was trained with that form",
                "tools",
            )
        params, beams = decoding(
            request,
            serving,
            max_tokens=max_tokens,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            calls=call_grammar(request, form) if form is not None else None,
        )
        options = request.options(tools=tools, cache_salt=request.cache_salt)
        prompt = await serving.chat_prompt(request, options)
        last = request.messages[-1]
        role = "assistant" if options.begins_answer else last.role
        return _Chat(
            serving=serving,
            request=request,
            prompts=[prompt],
            id=f"chatcmpl-{uuid.uuid4().hex}",
            model=model,
            started=started,
            params=params,
            beams=beams,
            tools=form,
            role=role,
            echo=_text(last.content) if request.echo and role == last.role else "",
            sent=defaultdict(lambda: _Sent(parser=form.parser(max_calls(request)) if form else None)),
        )


@dataclass
class _Sent(Sent):
    parser: ToolParser | None = None


@dataclass(frozen=True, kw_only=True)
class _Chat(Job[ChatChunkChoice, ChatChunk]):
    """A chat ready for the engine; ``tools`` is None where the model is told of none."""

    request: ChatRequest
    tools: ToolFormat | None
    role: str
    echo: str
    sent: Mapping[tuple[int, int], _Sent]

    def chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        chunk = ChatChunk(
            id=self.answer_id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            system_fingerprint=self.serving.info.fingerprint,
            choices=choices,
        )
        if self.request.return_token_ids and any(choice.delta.role for choice in choices):
            chunk.prompt_token_ids = list(self.prompts[0].token_ids)
        return chunk

    def new_choices(
        self, number: int, _: RequestOutput, sample: CompletionOutput
    ) -> Iterator[ChatChunkChoice]:
        sent, index = self.sent[number, sample.index], sample.index
        if sent.ended:
            return
        if not sent.begun:
            first = ChatDelta(role=self.role, content=self.echo)
            yield ChatChunkChoice(index=index, delta=first, logprobs=None, finish_reason=None)
        ids = sent.new_ids(sample) if self.request.return_token_ids else []
        text, logprobs = sent.advance(sample)
        pieces = ToolPieces(text)
        if sent.parser is not None:
            pieces = sent.parser.push(text)
            if sample.finish_reason is not None:
                rest = sent.parser.flush()
                pieces = ToolPieces(pieces.content + rest.content, pieces.calls + rest.calls)
        if not (pieces.content or pieces.calls or logprobs or ids or sample.finish_reason):
            return
        delta = ChatDelta()
        if pieces.content:
            delta.content = pieces.content
        if pieces.calls:
            delta.tool_calls = deltas(pieces)
        told = chat_logprobs(logprobs, self.request.top_logprobs or 0) if logprobs else None
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=told, finish_reason=None)
        if ids:
            choice.token_ids = ids
        if sample.finish_reason is not None:
            num_calls = sent.parser.num_calls if sent.parser is not None else 0
            choice.finish_reason = self._finish_reason(sample.finish_reason, num_calls)
            choice.stop_reason = sample.stop_reason
        yield choice

    def choice(self, sample: CompletionOutput) -> ChatChoice:
        """A finished sample."""
        request, text, calls = self.request, sample.text, list[ToolCall]()
        if self.tools is not None:
            text, calls = parse_answer(self.tools, text, max_calls(request))
        content = self.echo + text
        message = AssistantMessage(role=self.role, content=content or (None if calls else ""))
        if calls:
            message.tool_calls = calls
        told = sample.logprobs if request.logprobs else None
        choice = ChatChoice(
            index=sample.index,
            message=message,
            logprobs=chat_logprobs(told, request.top_logprobs or 0) if told is not None else None,
            finish_reason=self._finish_reason(sample.finish_reason or "abort", len(calls)),
            stop_reason=sample.stop_reason,
        )
        if request.return_token_ids:
            choice.token_ids = list(sample.token_ids)
        return choice

    def _finish_reason(self, reason: str, num_calls: int) -> str:
        """OpenAI says "tool_calls" where the model chose to call, "stop" where it was told what to call."""
        chosen = num_calls > 0 and not isinstance(self.request.tool_choice, NamedToolChoice)
        return "tool_calls" if chosen and reason == "stop" else reason


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content or () if part.type in ("text", "input_text"))
