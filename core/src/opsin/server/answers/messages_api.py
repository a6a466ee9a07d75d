"""Anthropic's Messages: a chat with other words. Requests become chats, answers and streams become blocks."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from pydantic import RootModel, ValidationError

from opsin.server.answers.chat import ChatCompletions
from opsin.server.answers.tokens import Tokenization
from opsin.server.http.body import refused
from opsin.server.schema.chat import ChatRequest
from opsin.server.schema.messages_api import CountTokensRequest, MessagesRequest
from opsin.server.schema.prompts import TokenizeRequest
from opsin.server.schema.responses import ChatChunk, Usage
from opsin.server.serving import Serving

_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "abort": "end_turn"}


class Block(RootModel[dict[str, Any]]):
    """An object whose fields are those of Anthropic's documentation: a message, or an event of its stream."""


class AnthropicMessages:
    """Answers `MessagesRequest`s with one model."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def create(self, request: MessagesRequest) -> Block:
        """The whole message.

        Raises:
            ApiError, RequestError: the request cannot be answered.
        """
        answer = await ChatCompletions(self._serving).create(_chat(request))
        [choice] = answer.choices
        content: list[dict[str, Any]] = []
        if choice.message.content:
            content.append({"type": "text", "text": choice.message.content})
        for call in choice.message.tool_calls:
            given = _arguments(call.function.arguments)
            content.append({"type": "tool_use", "id": call.id, "name": call.function.name, "input": given})
        message = _message(answer.model)
        message |= {"content": content, "usage": _usage(answer.usage)}
        message |= _stopped(choice.finish_reason, choice.stop_reason, bool(choice.message.tool_calls))
        return Block(message)

    async def stream(self, request: MessagesRequest) -> AsyncGenerator[Block, None]:
        """The message as it is made: Anthropic's events."""
        state = _Stream()
        async with aclosing(ChatCompletions(self._serving).stream(_chat(request))) as chunks:
            async for chunk in chunks:
                for event in state.take(chunk):
                    yield event
        for event in state.end():
            yield event

    async def count(self, request: CountTokensRequest) -> Block:
        """How many tokens a request's prompt has, pictures expanded.

        Raises:
            ApiError, RequestError: the request cannot be a prompt.
        """
        body = {"model": request.model, "messages": request.chat_messages(), "tools": request.chat_tools()}
        try:
            asked = TokenizeRequest.model_validate({k: v for k, v in body.items() if v is not None})
        except ValidationError as error:
            raise refused(error) from None
        counted = await Tokenization(self._serving).tokenize(asked)
        return Block({"input_tokens": counted.count})


def _chat(request: MessagesRequest) -> ChatRequest:
    try:
        body = request.chat()
        return ChatRequest.model_validate({k: v for k, v in body.items() if v is not None})
    except ValidationError as error:
        raise refused(error) from None


def _message(model: str) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }


def _arguments(text: str) -> Any:
    """A call's arguments as an object; an answer that was cut off may hold half of one."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}


def _stopped(finish: str | None, stop: int | str | None, calls: bool) -> dict[str, Any]:
    reason = "tool_use" if calls and finish != "length" else _STOPS[finish or "abort"]
    if isinstance(stop, str) and reason == "end_turn":
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(used: Usage) -> dict[str, int]:
    cached = used.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": used.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": used.completion_tokens,
    }


class _Stream:
    """What has come of a streamed chat, and the events it makes."""

    def __init__(self) -> None:
        self._begun = self._calls = False
        self._index = -1
        self._kind = ""
        self._finish: str | None = None
        self._stop: int | str | None = None
        self._usage: Usage | None = None

    def take(self, chunk: ChatChunk) -> Iterator[Block]:
        """The events of a chunk."""
        if not self._begun:
            self._begun = True
            yield Block({"type": "message_start", "message": _message(chunk.model)})
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices:
            if choice.delta.content:
                if self._kind != "text":
                    yield from self._begin("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": choice.delta.content})
            for piece in choice.delta.tool_calls:
                if piece.id:
                    self._calls = True
                    block = {"type": "tool_use", "id": piece.id, "name": piece.function.name, "input": {}}
                    yield from self._begin("tool_use", block)
                if piece.function.arguments:
                    yield self._delta({"type": "input_json_delta", "partial_json": piece.function.arguments})
            if choice.finish_reason is not None:
                self._finish, self._stop = choice.finish_reason, choice.stop_reason

    def end(self) -> Iterator[Block]:
        """The events after the last chunk."""
        yield from self._close()
        used = {} if self._usage is None else _usage(self._usage)
        stopped = _stopped(self._finish, self._stop, self._calls)
        yield Block({"type": "message_delta", "delta": stopped, "usage": used})
        yield Block({"type": "message_stop"})

    def _begin(self, kind: str, block: dict[str, Any]) -> Iterator[Block]:
        yield from self._close()
        self._index, self._kind = self._index + 1, kind
        yield Block({"type": "content_block_start", "index": self._index, "content_block": block})

    def _close(self) -> Iterator[Block]:
        if self._kind:
            self._kind = ""
            yield Block({"type": "content_block_stop", "index": self._index})

    def _delta(self, delta: dict[str, Any]) -> Block:
        return Block({"type": "content_block_delta", "index": self._index, "delta": delta})
