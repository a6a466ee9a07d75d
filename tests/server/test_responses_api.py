"""OpenAI's Responses, with its client: what chats answer, in other words."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from opsin.server.settings import ServerSettings
from tests.server.in_thread import Running, golden_config, running
from tests.server.pictures import picture

URL = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather somewhere",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 4}},
        "required": ["city"],
    },
}
FIXED: dict[str, Any] = {"model": "m", "temperature": 0, "max_output_tokens": 12}


@pytest.fixture(scope="module")
def keeping() -> Iterator[Running]:
    settings = ServerSettings(served_model_name=("m",), response_store=2)
    with running(golden_config(), settings) as started:
        yield started


@pytest.fixture
def client(keeping: Running) -> openai.OpenAI:
    return keeping.client()


def chat_answer(client: openai.OpenAI, messages: list[Any], **fields: Any) -> str:
    answer = client.chat.completions.create(
        model="m", messages=messages, temperature=0, max_tokens=12, **fields
    )
    return answer.choices[0].message.content or ""


def test_a_text_is_answered_as_a_chat_is(client: openai.OpenAI) -> None:
    response = client.responses.create(input="Hello", instructions="Be brief.", **FIXED)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert response.output_text == chat_answer(client, chat)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 12
    assert response.instructions == "Be brief."


def test_pictures_and_earlier_turns(client: openai.OpenAI) -> None:
    items: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": URL, "detail": "auto"},
                {"type": "input_text", "text": "What is it?"},
            ],
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "A square.", "annotations": []}],
        },
        {"type": "reasoning", "id": "r", "summary": []},
        {"role": "user", "content": "Which colour?"},
    ]
    shown = [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "What is it?"}]
    chat = [
        {"role": "user", "content": shown},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Which colour?"},
    ]
    response = client.responses.create(input=items, reasoning={"effort": "low"}, store=False, **FIXED)
    assert response.output_text == chat_answer(client, chat)


def test_a_stream_is_the_whole_response_in_pieces(client: openai.OpenAI) -> None:
    whole = client.responses.create(input="Hello", **FIXED)
    events = list(client.responses.create(input="Hello", stream=True, **FIXED))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert deltas
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert last.usage == whole.usage or last.usage.output_tokens == whole.usage.output_tokens
    with client.responses.stream(input="Hello", **FIXED) as helper:  # the client's own accumulation
        for _ in helper:
            pass


def test_calls_and_their_results(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {**FIXED, "max_output_tokens": 60, "tools": [TOOL], "tool_choice": "required"}
    response = client.responses.create(input="Paris?", parallel_tool_calls=False, **fields)
    [call] = response.output
    assert call.type == "function_call"
    assert call.name == "weather"
    assert response.status == "completed"
    events = list(client.responses.create(input="Paris?", parallel_tool_calls=False, stream=True, **fields))
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert done.arguments == call.arguments
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments
    assert events[-1].type == "response.completed"
    items: list[Any] = [
        {"role": "user", "content": "Paris?"},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"},
    ]
    again = client.responses.create(input=items, tools=[TOOL], **FIXED)
    function = {"name": call.name, "arguments": call.arguments}
    made = {"id": call.call_id, "type": "function", "function": function}
    chat = [
        {"role": "user", "content": "Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "Rain"},
    ]
    tool = {"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}
    assert again.output_text == chat_answer(client, chat, tools=[tool])


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    response = client.responses.create(input="Hello", text=form, **{**FIXED, "max_output_tokens": 40})
    assert response.output_text.replace(" ", "") in ('{"a":"x"}', '{"a":"y"}')


def test_a_conversation_goes_on_by_its_last_response(client: openai.OpenAI) -> None:
    first = client.responses.create(input="Hello", **FIXED)
    second = client.responses.create(input="And then?", previous_response_id=first.id, **FIXED)
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And then?"},
    ]
    assert second.output_text == chat_answer(client, chat)
    assert second.previous_response_id == first.id
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.create(input="One more", **FIXED)
    with pytest.raises(openai.NotFoundError, match="keeps the last 2 responses"):
        client.responses.retrieve(first.id)
    unkept = client.responses.create(input="Hello", store=False, **FIXED)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(input="x", previous_response_id=unkept.id, **FIXED)


def test_nothing_is_kept_by_default(server: Running) -> None:
    client = server.client()
    response = client.responses.create(model="golden", input="Hello", max_output_tokens=4)
    with pytest.raises(openai.NotFoundError, match="--response-store"):
        client.responses.create(model="golden", input="x", previous_response_id=response.id)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, 'input[0]: unknown or missing "type"'),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, 'input[0]: unknown or missing "type"'),
        ({"input": [{"role": "user", "contents": "x"}]}, "did you mean 'content'"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]: unknown"),
        ({"input": "x", "background": True}, "background is not supported"),
        ({"input": "x", "max_output_token": 4}, "did you mean 'max_output_tokens'"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "x", "tool_choice": "required"}, "needs tools"),
    ],
)
def test_what_cannot_be_asked(keeping: Running, fields: dict[str, Any], message: str) -> None:
    response = keeping.post("/v1/responses", {"model": "m", **fields})
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]
