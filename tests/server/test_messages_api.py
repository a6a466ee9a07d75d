"""Anthropic's Messages, with its client: what chats answer, in other words."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from opsin.server.settings import ServerSettings
from tests.server.in_thread import Running, golden_config, running
from tests.server.pictures import picture

DATA = base64.b64encode(picture()).decode()
TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "The weather somewhere",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 4}},
        "required": ["city"],
    },
}
FIXED: dict[str, Any] = {"model": "m", "max_tokens": 12}


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    settings = ServerSettings(served_model_name=("m",), api_key=("secret",))
    with running(golden_config(), settings) as started:
        yield started


@pytest.fixture
def client(locked: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=locked.url, api_key="secret", max_retries=0)


def chat_answer(locked: Running, messages: list[Any], **fields: Any) -> str:
    answer = locked.client("secret").chat.completions.create(
        model="m", messages=messages, temperature=0, max_tokens=12, **fields
    )
    return answer.choices[0].message.content or ""


def test_a_message_is_answered_as_a_chat_is(locked: Running, client: anthropic.Anthropic) -> None:
    message = client.messages.create(
        system="Be brief.", messages=[{"role": "user", "content": "Hello"}], **FIXED
    )
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    [block] = message.content
    assert block.type == "text"
    assert block.text == chat_answer(locked, chat)
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 12


def test_pictures_blocks_and_thoughts(locked: Running, client: anthropic.Anthropic) -> None:
    shown: list[Any] = [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}},
        {"type": "text", "text": "What is it?"},
    ]
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    messages: list[Any] = [
        {"role": "user", "content": shown},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "A square."}]},
        {"role": "user", "content": "Which colour?"},
    ]
    message = client.messages.create(messages=messages, **FIXED)
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Which colour?"},
    ]
    assert message.content[0].text == chat_answer(locked, chat)
    counted = client.messages.count_tokens(model="m", messages=messages)
    assert counted.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def test_a_stream_is_the_whole_message_in_pieces(client: anthropic.Anthropic) -> None:
    asked: list[Any] = [{"role": "user", "content": "Hello"}]
    whole = client.messages.create(messages=asked, **FIXED)
    with client.messages.stream(messages=asked, **FIXED) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == whole.content[0].text == final.content[0].text
    assert pieces
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == 12
    kinds = [event.type for event in client.messages.create(messages=asked, stream=True, **FIXED)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_calls_and_their_results(locked: Running, client: anthropic.Anthropic) -> None:
    asked: list[Any] = [{"role": "user", "content": "Paris?"}]
    fields: dict[str, Any] = {**FIXED, "max_tokens": 60, "tools": [TOOL]}
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    message = client.messages.create(messages=asked, tool_choice=choice, **fields)
    [call] = message.content
    assert call.type == "tool_use"
    assert call.name == "weather"
    assert set(call.input) == {"city"}
    assert message.stop_reason == "tool_use"
    with client.messages.stream(messages=asked, tool_choice=choice, **fields) as stream:
        [streamed] = stream.get_final_message().content
    assert streamed.input == call.input
    named: Any = {"type": "tool", "name": "weather"}
    assert client.messages.create(messages=asked, tool_choice=named, **fields).content[0].name == "weather"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain"}]}
    called = {"role": "assistant", "content": [call.model_dump(exclude_none=True)]}
    told = {"role": "user", "content": [result, {"type": "text", "text": "So?"}]}
    again = client.messages.create(messages=[*asked, called, told], tools=[TOOL], **FIXED)
    assert again.content


def test_stop_sequences_are_named(client: anthropic.Anthropic) -> None:
    asked: list[Any] = [{"role": "user", "content": "Hello"}]
    text = client.messages.create(messages=asked, **FIXED).content[0].text
    stop = text[3:5]
    message = client.messages.create(messages=asked, stop_sequences=[stop], **FIXED)
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == stop


def test_errors_are_anthropics(locked: Running, client: anthropic.Anthropic) -> None:
    asked: list[Any] = [{"role": "user", "content": "Hello"}]
    with pytest.raises(anthropic.BadRequestError, match="did you mean 'max_tokens'"):
        client.messages.create(messages=asked, extra_body={"max_token": 4}, **FIXED)
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(messages=asked, **{**FIXED, "model": "other"})
    assert unknown.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\]: unknown or missing"):
        client.messages.create(messages=[{"role": "user", "content": [{"type": "document"}]}], **FIXED)
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(messages=asked, **FIXED)


def test_structured_output(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    config: Any = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
    message = client.messages.create(
        messages=[{"role": "user", "content": "Hello"}], output_config=config, model="m", max_tokens=40
    )
    assert message.content[0].text.replace(" ", "") in ('{"a":"x"}', '{"a":"y"}')
