"""OpenAI's Responses: a chat with other words. Requests become chats, answers and streams become items."""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from pydantic import RootModel, ValidationError

from opsin.server.answers.chat import ChatCompletions
from opsin.server.http.body import refused
from opsin.server.http.errors import ApiError
from opsin.server.schema.chat import ChatRequest
from opsin.server.schema.responses import ChatChunk, ChatCompletion, FunctionCall, ToolCall, ToolCallDelta
from opsin.server.schema.responses_api import ResponsesRequest
from opsin.server.serving import Serving


class Item(RootModel[dict[str, Any]]):
    """An object whose fields are those of OpenAI's documentation: a response, or an event of its stream."""


class ResponseStore:
    """The last responses, with what was said before them, for ``previous_response_id``. In memory only."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = OrderedDict()

    def keep(self, response: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        """Keep a response; the oldest goes where there is no room."""
        self._kept[response["id"]] = response, messages
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)

    def find(self, response_id: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A response, and the conversation that ends with it.

        Raises:
            ApiError: it is not here.
        """
        if response_id not in self._kept:
            why = (
                "this server keeps no responses; it would with --response-store N"
                if self.size == 0
                else f"this server keeps the last {self.size} responses (--response-store), and not this one"
            )
            raise ApiError(404, why, param="previous_response_id")
        return self._kept[response_id]

    def forget(self, response_id: str) -> None:
        """Delete a response; see `find`."""
        self.find(response_id)
        del self._kept[response_id]


class Responses:
    """Answers `ResponsesRequest`s with one model."""

    def __init__(self, serving: Serving, store: ResponseStore) -> None:
        self._serving, self._store = serving, store

    async def create(self, request: ResponsesRequest) -> Item:
        """The whole response.

        Raises:
            ApiError, RequestError: the request cannot be answered.
        """
        chat, earlier = self._chat(request)
        answer = await ChatCompletions(self._serving).create(chat)
        response = _response(request, f"resp_{uuid.uuid4().hex}", answer.created, answer.model)
        return Item(self._finished(response, request, earlier, answer))

    async def stream(self, request: ResponsesRequest) -> AsyncGenerator[Item, None]:
        """The response as it is made: OpenAI's events, numbered."""
        chat, earlier = self._chat(request)
        number = 0

        def event(kind: str, **fields: Any) -> Item:
            nonlocal number
            number += 1
            return Item({"type": kind, "sequence_number": number - 1, **fields})

        async with aclosing(ChatCompletions(self._serving).stream(chat)) as chunks:
            state = _Stream()
            async for chunk in chunks:
                if state.response is None:
                    made = _response(request, f"resp_{uuid.uuid4().hex}", chunk.created, chunk.model)
                    state.response = made
                    yield event("response.created", response=dict(made))
                    yield event("response.in_progress", response=dict(made))
                for kind, fields in state.take(chunk):
                    yield event(kind, **fields)
            for kind, fields in state.end():
                yield event(kind, **fields)
            assert state.response is not None
            whole = self._finished(state.response, request, earlier, state.answer())
            done = "response.completed" if whole["status"] == "completed" else "response.incomplete"
            yield event(done, response=whole)

    def _chat(self, request: ResponsesRequest) -> tuple[ChatRequest, list[dict[str, Any]]]:
        earlier: list[dict[str, Any]] = []
        if request.previous_response_id is not None:
            earlier = self._store.find(request.previous_response_id)[1]
        try:
            body = request.chat(earlier)
            return ChatRequest.model_validate({k: v for k, v in body.items() if v is not None}), earlier
        except ValidationError as error:
            raise refused(error) from None

    def _finished(
        self,
        response: dict[str, Any],
        request: ResponsesRequest,
        earlier: list[dict[str, Any]],
        answer: ChatCompletion,
    ) -> dict[str, Any]:
        [choice] = answer.choices
        cut = choice.finish_reason == "length"
        message, calls = choice.message, choice.message.tool_calls
        status = "incomplete" if cut else "completed"
        output: list[dict[str, Any]] = []
        if message.content:
            told = [] if choice.logprobs is None else [t.model_dump() for t in choice.logprobs.content]
            output.append(_message(message.content, status, told))
        output += (_call(call, status) for call in calls)
        used = answer.usage
        response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output,
            "usage": {
                "input_tokens": used.prompt_tokens,
                "input_tokens_details": {"cached_tokens": used.prompt_tokens_details.cached_tokens},
                "output_tokens": used.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used.total_tokens,
            },
        }
        if self._store.size and request.store is not False:
            response["store"] = True
            said: dict[str, Any] = {"role": "assistant", "content": message.content}
            if calls:
                said["tool_calls"] = [call.model_dump() for call in calls]
            self._store.keep(response, [*earlier, *request.messages(), said])
        return response


def _response(request: ResponsesRequest, response_id: str, created: int, model: str) -> dict[str, Any]:
    form = None if request.text is None else request.text.format
    told = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
    choice = request.tool_choice
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": request.temperature,
        "text": {"format": told},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump() if choice else "auto",
        "tools": [tool.model_dump() for tool in request.tools or ()],
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _message(text: str, status: str, logprobs: list[dict[str, Any]], item_id: str = "") -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
    return {
        "type": "message",
        "id": item_id or f"msg_{uuid.uuid4().hex}",
        "status": status,
        "role": "assistant",
        "content": [part],
    }


def _call(call: ToolCall, status: str, item_id: str = "") -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": item_id or f"fc_{uuid.uuid4().hex}",
        "call_id": call.id,
        "name": call.function.name,
        "arguments": call.function.arguments,
        "status": status,
    }


class _Stream:
    """What has come of a streamed chat, and the events it makes."""

    def __init__(self) -> None:
        self.response: dict[str, Any] | None = None
        self._chunks: list[ChatChunk] = []
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._message_index: int | None = None
        self._calls: list[tuple[ToolCall, str, int]] = []
        self._next = 0

    def take(self, chunk: ChatChunk) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of a chunk."""
        self._chunks.append(chunk)
        for choice in chunk.choices:
            if choice.logprobs is not None:
                self._logprobs += (told.model_dump() for told in choice.logprobs.content)
            if choice.delta.content:
                yield from self._said(choice.delta.content)
            for piece in choice.delta.tool_calls:
                yield from self._called(piece)

    def _said(self, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._message_index is None:
            self._message_index, self._next = self._next, self._next + 1
            item = {**_message("", "in_progress", [], self._message_id), "content": []}
            yield "response.output_item.added", {"output_index": self._message_index, "item": item}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield "response.content_part.added", {**self._place(), "part": part}
        self._text += text
        yield "response.output_text.delta", {**self._place(), "delta": text, "logprobs": []}

    def _called(self, piece: ToolCallDelta) -> Iterator[tuple[str, dict[str, Any]]]:
        if piece.id:
            function = FunctionCall(name=piece.function.name, arguments="")
            call = ToolCall(id=piece.id, type="function", function=function)
            self._calls.append((call, f"fc_{uuid.uuid4().hex}", self._next))
            self._next += 1
            item = _call(call, "in_progress", self._calls[-1][1])
            yield "response.output_item.added", {"output_index": self._calls[-1][2], "item": item}
        call, item_id, index = self._calls[-1]
        if piece.function.arguments:
            call.function.arguments += piece.function.arguments
            fields = {"item_id": item_id, "output_index": index, "delta": piece.function.arguments}
            yield "response.function_call_arguments.delta", fields

    def end(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events after the last chunk, but for the very last."""
        if self._message_index is not None:
            item = _message(self._text, "completed", self._logprobs, self._message_id)
            done = {**self._place(), "text": self._text, "logprobs": self._logprobs}
            yield "response.output_text.done", done
            yield "response.content_part.done", {**self._place(), "part": item["content"][0]}
            yield "response.output_item.done", {"output_index": self._message_index, "item": item}
        for call, item_id, index in self._calls:
            fields = {"item_id": item_id, "output_index": index, "arguments": call.function.arguments}
            yield "response.function_call_arguments.done", {**fields, "name": call.function.name}
            item = _call(call, "completed", item_id)
            yield "response.output_item.done", {"output_index": index, "item": item}

    def answer(self) -> ChatCompletion:
        """The same as a whole answer."""
        finish = [choice for chunk in self._chunks for choice in chunk.choices if choice.finish_reason]
        usage = next(chunk.usage for chunk in reversed(self._chunks) if chunk.usage is not None)
        message: Mapping[str, Any] = {
            "role": "assistant",
            "content": self._text or None,
            "tool_calls": [call.model_dump() for call, _, _ in self._calls],
        }
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": self._logprobs} if self._logprobs else None,
            "finish_reason": finish[-1].finish_reason if finish else "abort",
            "stop_reason": None,
        }
        return ChatCompletion.model_validate(
            {
                "id": "",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": self._chunks[-1].model,
                "choices": [choice],
                "usage": usage.model_dump(),
                "prompt_logprobs": None,
            }
        )

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": self._message_index, "content_index": 0}
