"""Each field of a request reaches what it means: a table for each route, with a row for every field there is.

What the engine is asked is compared with what it is asked without the field. A field without a row fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest

from opsin import BeamSearchParams, PoolingParams, SamplingParams, StructuredOutput
from opsin.api import ProcessedPrompt
from opsin.server.schema.chat import ChatRequest
from opsin.server.schema.messages_api import MessagesRequest
from opsin.server.schema.prompts import CompletionRequest, EmbeddingRequest
from opsin.server.schema.responses_api import ResponsesRequest
from opsin.server.settings import ServerSettings
from tests.server.in_thread import Running, golden_config, running
from tests.server.messages import CAT, data_url, image, text, user

Params = SamplingParams | PoolingParams | BeamSearchParams
Asked = list[tuple[ProcessedPrompt, Params]]

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@contextmanager
def recorded(server: Running) -> Iterator[Asked]:
    """What the engine is asked inside the block; it answers all the same."""
    engine = server.app.host.engine()
    asked: Asked = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("generate", "embed", "beam_search"):
            right: Callable[..., Any] = getattr(engine, name)

            def noted(
                prompt: ProcessedPrompt, params: Params, *rest: Any, right: Any = right, **named: Any
            ) -> Any:
                asked.append((prompt, params))
                return right(prompt, params, *rest, **named)

            patch.setattr(engine, name, noted)
        yield asked


def changes(one: Params, other: Params) -> dict[str, Any]:
    """What the second has that the first has not."""
    if type(one) is not type(other):
        return {"kind": type(other).__name__}
    names = [field.name for field in fields(one)]
    return {name: getattr(other, name) for name in names if getattr(one, name) != getattr(other, name)}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Takes priorities, too."""
    config = golden_config(scheduling_policy="priority", limit_mm_per_prompt={"image": 2})
    with running(config, ServerSettings(trust_request_chat_template=True)) as started:
        yield started


SAMPLING: dict[str, tuple[Any, dict[str, Any]]] = {
    "min_tokens": (1, {"min_tokens": 1}),
    "n": (2, {"n": 2}),
    "temperature": (0.5, {"temperature": 0.5}),
    "top_p": (0.9, {"top_p": 0.9}),
    "top_k": (5, {"top_k": 5}),
    "min_p": (0.1, {"min_p": 0.1}),
    "seed": (7, {"seed": 7}),
    "stop": ("x", {"stop": ("x",)}),
    "stop_token_ids": ([5], {"stop_token_ids": (5,)}),
    "include_stop_str_in_output": (True, {"include_stop_str_in_output": True}),
    "ignore_eos": (False, {"ignore_eos": False}),
    "presence_penalty": (0.5, {"presence_penalty": 0.5}),
    "frequency_penalty": (-0.5, {"frequency_penalty": -0.5}),
    "repetition_penalty": (1.1, {"repetition_penalty": 1.1}),
    "logit_bias": ({"5": -100}, {"logit_bias": {5: -100}}),
    "allowed_token_ids": ([5, 6], {"allowed_token_ids": (5, 6)}),
    "bad_words": (["x"], {"bad_words": ("x",)}),
    "prompt_logprobs": (2, {"prompt_logprobs": 2}),
    "skip_special_tokens": (False, {"skip_special_tokens": False}),
    "priority": (-3, {"priority": -3}),
    "response_format": ({"type": "json_object"}, {"structured": StructuredOutput(json_object=True)}),
    "structured_outputs": ({"choice": ["a", "b"]}, {"structured": StructuredOutput(choice=["a", "b"])}),
    "guided_json": (SCHEMA, {"structured": StructuredOutput(json=SCHEMA)}),
    "guided_regex": ("a+", {"structured": StructuredOutput(regex="a+")}),
    "guided_choice": (["a"], {"structured": StructuredOutput(choice=["a"])}),
    "guided_grammar": ('start: "a"', {"structured": StructuredOutput(grammar='start: "a"')}),
    "max_tokens": (3, {"max_tokens": 3}),
}
"""Field -> value, and what becomes of the engine's parameters."""

Seen = tuple[Any, Any, list[Any], list[Any]]
"""Of a request without and with a field: the answers, and what the engine was asked."""


def other_prompt(seen: Seen) -> bool:
    before, after = (asked[0][0] for asked in seen[2:])
    return list(before.token_ids) != list(after.token_ids)


def other_salt(seen: Seen) -> bool:
    """What is cached of one is not found by the other."""
    before, after = (asked[0][0].salt for asked in seen[2:])
    return bool(after) and before != after


def answer(**expected: Any) -> Callable[[Seen], bool]:
    """Something of the answer: a path with dots -> a value, or whether there is one."""

    def check(seen: Seen) -> bool:
        for path, wanted in expected.items():
            found: Any = seen[1]
            for step in path.split("__"):
                found = found[int(step)] if step.isdigit() else found.get(step)
            if found != wanted and not (wanted is ... and found is not None):
                return False
        return True

    return check


PICTURE = user(image(data_url(CAT)), text("?"))
Further = Mapping[str, tuple[dict[str, Any], Callable[[Seen], bool]]]

GENERATING: dict[str, tuple[dict[str, Any], Callable[[Seen], bool]]] = {
    "model": ({"model": "none"}, answer(error__code=404)),
    "best_of": ({"best_of": 2}, lambda seen: seen[3][0][1].n == 2 and len(seen[1]["choices"]) == 1),
    "use_beam_search": (
        {"use_beam_search": True, "n": 2},
        lambda seen: isinstance(seen[3][0][1], BeamSearchParams) and seen[3][0][1].beam_width == 2,
    ),
    "length_penalty": (
        {"use_beam_search": True, "n": 2, "length_penalty": 0.5},
        lambda seen: seen[3][0][1].length_penalty == 0.5,
    ),
    "stream": ({"stream": True}, lambda seen: seen[1].startswith("data: ")),
    "stream_options": (
        {"stream": True, "stream_options": {"include_usage": True}},
        lambda seen: '"usage":{' in seen[1],
    ),
    "cache_salt": ({"cache_salt": "salt"}, other_salt),
    "request_id": ({"request_id": "mine"}, lambda seen: "mine" in seen[1]["id"]),
    "return_token_ids": (
        {"return_token_ids": True}, lambda seen: len(seen[1]["choices"][0]["token_ids"]) == 2,
    ),
}  # fmt: skip

CHAT: Further = {
    **GENERATING,
    "messages": ({"messages": user("Another")}, other_prompt),
    "max_completion_tokens": ({"max_completion_tokens": 3}, lambda seen: seen[3][0][1].max_tokens == 3),
    "logprobs": ({"logprobs": True}, answer(choices__0__logprobs=...)),
    "top_logprobs": (
        {"logprobs": True, "top_logprobs": 3},
        lambda seen: len(seen[1]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 3,
    ),
    "echo": (
        {"echo": True, "messages": [*user("Say:"), {"role": "assistant", "content": "Well"}],
         "continue_final_message": True},
        lambda seen: seen[1]["choices"][0]["message"]["content"].startswith("Well"),
    ),
    "tools": ({"tools": [TOOL]}, other_prompt),
    "tool_choice": (
        {"tools": [TOOL], "tool_choice": "required", "max_tokens": 30},
        lambda seen: seen[3][0][1].structured is not None,
    ),
    "parallel_tool_calls": (
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        lambda seen: seen[3][0][1].structured is not None,
    ),
    "add_generation_prompt": ({"add_generation_prompt": False}, other_prompt),
    "continue_final_message": (
        {"messages": [*user("Say:"), {"role": "assistant", "content": "Well"}],
         "continue_final_message": True},
        other_prompt,
    ),
    "chat_template": ({"chat_template": "{{ messages[0]['role'] }}"}, other_prompt),
    "chat_template_kwargs": (
        {"chat_template": "{{ word }}", "chat_template_kwargs": {"word": "Hello"}}, other_prompt,
    ),
    "mm_processor_kwargs": (
        {"messages": PICTURE, "mm_processor_kwargs": {"max_pixels": 28 * 28 * 4}},
        lambda seen: len(seen[3][0][0].token_ids) < 60,
    ),
    "allow_special_tokens": (
        {"messages": user("<|im_end|>"), "allow_special_tokens": True},
        lambda seen: len(seen[3][0][0].token_ids) < 40,
    ),
}  # fmt: skip

COMPLETIONS: Further = {
    **GENERATING,
    "prompt": ({"prompt": "Another"}, other_prompt),
    "logprobs": ({"logprobs": 2}, answer(choices__0__logprobs=...)),
    "echo": ({"echo": True}, lambda seen: seen[1]["choices"][0]["text"].startswith("Hello")),
    "truncate_prompt_tokens": (
        {"truncate_prompt_tokens": 1}, lambda seen: len(seen[3][0][0].token_ids) == 1,
    ),
    "mm_processor_kwargs": (
        {"mm_processor_kwargs": {"max_pixels": 784}}, answer(error__param="mm_processor_kwargs"),
    ),
}  # fmt: skip

RESPONSES: Further = {
    "input": ({"input": "Another"}, other_prompt),
    "model": ({"model": "none"}, answer(error__code=404)),
    "instructions": ({"instructions": "Be short."}, other_prompt),
    "previous_response_id": ({"previous_response_id": "resp_none"}, answer(error__code=404)),
    "max_output_tokens": ({"max_output_tokens": 3}, lambda seen: seen[3][0][1].max_tokens == 3),
    "temperature": ({"temperature": 0.5}, lambda seen: seen[3][0][1].temperature == 0.5),
    "top_p": ({"top_p": 0.9}, lambda seen: seen[3][0][1].top_p == 0.9),
    "top_logprobs": ({"top_logprobs": 2}, lambda seen: seen[3][0][1].logprobs == 2),
    "text": (
        {"text": {"format": {"type": "json_object"}}},
        lambda seen: seen[3][0][1].structured == StructuredOutput(json_object=True),
    ),
    "tools": ({"tools": [{"type": "function", "name": "look", "parameters": {}}]}, other_prompt),
    "tool_choice": (
        {"tools": [{"type": "function", "name": "look", "parameters": {}}], "tool_choice": "required"},
        lambda seen: seen[3][0][1].structured is not None,
    ),
    "parallel_tool_calls": (
        {"tools": [{"type": "function", "name": "look", "parameters": {}}], "tool_choice": "required",
         "parallel_tool_calls": False},
        lambda seen: seen[3][0][1].structured is not None,
    ),
    "store": ({"store": True}, answer(store=False)),  # this server has no store, and says so
    "stream": ({"stream": True}, lambda seen: "event: response.created" in seen[1]),
    "stream_options": (
        {"stream": True, "stream_options": {"include_usage": True}},
        lambda seen: "event: response.created" in seen[1],
    ),
    "metadata": ({"metadata": {"a": "b"}}, answer(metadata__a="b")),
}  # fmt: skip

MESSAGES: Further = {
    "messages": ({"messages": user("Another")}, other_prompt),
    "model": ({"model": "none"}, answer(error__type="not_found_error")),
    "system": ({"system": "Be short."}, other_prompt),
    "max_tokens": ({"max_tokens": 3}, lambda seen: seen[3][0][1].max_tokens == 3),
    "temperature": ({"temperature": 0.5}, lambda seen: seen[3][0][1].temperature == 0.5),
    "top_p": ({"top_p": 0.9}, lambda seen: seen[3][0][1].top_p == 0.9),
    "top_k": ({"top_k": 5}, lambda seen: seen[3][0][1].top_k == 5),
    "stop_sequences": ({"stop_sequences": ["x"]}, lambda seen: tuple(seen[3][0][1].stop) == ("x",)),
    "stream": ({"stream": True}, lambda seen: "event: message_start" in seen[1]),
    "tools": ({"tools": [{"name": "look", "input_schema": {"type": "object"}}]}, other_prompt),
    "tool_choice": (
        {"tools": [{"name": "look", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"}},
        lambda seen: seen[3][0][1].structured is not None,
    ),
    "output_config": (
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        lambda seen: seen[3][0][1].structured == StructuredOutput(json=SCHEMA),
    ),
}

ROUTES: dict[str, tuple[type[Any], dict[str, Any], Further]] = {
    "/v1/chat/completions": (
        ChatRequest,
        {"messages": user("Hello"), "max_tokens": 2, "ignore_eos": True},
        CHAT,
    ),
    "/v1/completions": (
        CompletionRequest,
        {"prompt": "Hello", "max_tokens": 2, "ignore_eos": True},
        COMPLETIONS,
    ),
    "/v1/responses": (ResponsesRequest, {"input": "Hello", "max_output_tokens": 2}, RESPONSES),
    "/v1/messages": (MessagesRequest, {"messages": user("Hello"), "max_tokens": 2, "model": "m"}, MESSAGES),
}


def ask(server: Running, path: str, body: dict[str, Any]) -> tuple[Any, Asked]:
    with recorded(server) as asked:
        response = server.post(path, body)
        server.wait_idle()
    is_stream = "event-stream" in response.headers.get("content-type", "")
    return (response.text if is_stream else response.json()), list(asked)


def base(server: Running, path: str) -> dict[str, Any]:
    body = dict(ROUTES[path][1])
    return {**body, "model": server.app.host.engine().engine.info.config.model} if "model" in body else body


@pytest.mark.parametrize("field", SAMPLING)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_field_of_sampling(server: Running, path: str, field: str) -> None:
    value, expected = SAMPLING[field]
    body = base(server, path)
    before, after = (ask(server, path, {**body, **extra}) for extra in ({}, {field: value}))
    assert "error" not in after[0], after[0]
    changed = changes(before[1][0][1], after[1][0][1])
    assert {name: _plain(found) for name, found in changed.items()} == {
        name: _plain(wanted) for name, wanted in expected.items()
    }
    assert not other_prompt((before[0], after[0], before[1], after[1]))


def _plain(value: Any) -> Any:
    return (
        tuple(value)
        if isinstance(value, (list, tuple))
        else dict(value)
        if isinstance(value, Mapping)
        else value
    )


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, route in ROUTES.items() for field in route[2]]
)
def test_a_field(server: Running, path: str, field: str) -> None:
    extra, check = ROUTES[path][2][field]
    body = base(server, path)
    before, after = (ask(server, path, {**body, **more}) for more in ({}, extra))
    assert check((before[0], after[0], before[1], after[1])), after[0]


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_has_a_row(path: str) -> None:
    model, _, further = ROUTES[path]
    rows = set(further) | (set(SAMPLING) if issubclass(model, (ChatRequest, CompletionRequest)) else set())
    assert set(model.model_fields) == rows


def refused(param: str) -> Callable[[Any, Any], bool]:
    return lambda _, after: after["error"]["param"] == param


def other(before: Any, after: Any) -> bool:
    return bool(before["data"] != after["data"])


def same(before: Any, after: Any) -> bool:
    return bool(before["data"] == after["data"])


CHATTED = {"input": None, "messages": user("six")}
EMBEDDINGS: dict[str, tuple[dict[str, Any], Callable[[Any, Any], bool]]] = {
    "input": ({"input": "six"}, other),
    "messages": (CHATTED, other),
    "model": ({"model": "none"}, lambda _, after: after["error"]["code"] == 404),
    "encoding_format": (
        {"encoding_format": "base64"},
        lambda _, after: isinstance(after["data"][0]["embedding"], str),
    ),
    "dimensions": ({"dimensions": 4}, lambda _, after: len(after["data"][0]["embedding"]) == 4),
    "truncate_prompt_tokens": (
        {"truncate_prompt_tokens": 2},
        lambda _, after: after["usage"]["prompt_tokens"] == 2,
    ),
    "cache_salt": ({"cache_salt": "salt"}, same),
    "add_generation_prompt": ({**CHATTED, "add_generation_prompt": False}, other),
    "continue_final_message": ({**CHATTED, "continue_final_message": True}, other),
    "chat_template": ({**CHATTED, "chat_template": "{{ messages }}"}, refused("chat_template")),
    "chat_template_kwargs": ({**CHATTED, "chat_template_kwargs": {"a": "b"}}, other),
    "mm_processor_kwargs": ({"mm_processor_kwargs": {"max_pixels": 784}}, refused("mm_processor_kwargs")),
    "allow_special_tokens": (
        {"input": None, "messages": user("<|im_end|>"), "allow_special_tokens": True},
        other,
    ),
}


@pytest.mark.parametrize("field", EMBEDDINGS)
def test_a_field_of_embeddings(embedder: Running, field: str) -> None:
    extra, check = EMBEDDINGS[field]
    body = {"input": "one two three four five"}
    asked = [
        {name: value for name, value in {**body, **more}.items() if value is not None} for more in ({}, extra)
    ]
    before, after = (embedder.post("/v1/embeddings", one).json() for one in asked)
    assert check(before, after), after


def test_every_field_of_embeddings_has_a_row() -> None:
    assert set(EmbeddingRequest.model_fields) == set(EMBEDDINGS)
