"""Bodies made to cost the server time: refused by a few words, and soon enough that nobody else notices."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from opsin.server.http import body
from opsin.server.http.errors import ApiError
from opsin.server.schema.chat import ChatRequest
from opsin.server.schema.prompts import CompletionRequest, DetokenizeRequest, EmbeddingRequest
from opsin.server.schema.strict import MAX_FAULTS
from tests.server.in_thread import Running

MANY = 20_000
USER = [{"role": "user", "content": "x"}]


def of(**fields: Any) -> dict[str, Any]:
    return {"messages": USER, **fields}


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


def names(prefix: str) -> dict[str, Any]:
    return {f"{prefix}{index}": 1 for index in range(MANY)}


BODIES: dict[str, tuple[type[BaseModel], Any]] = {
    "content": (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    "tool_calls": (
        ChatRequest,
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}] * MANY}]},
    ),
    "messages": (ChatRequest, {"messages": [{}] * MANY}),
    "tools": (ChatRequest, of(tools=[{}] * MANY)),
    "stop": (ChatRequest, of(stop=[{}] * MANY)),
    "stop_token_ids": (ChatRequest, of(stop_token_ids=[{}] * MANY)),
    "allowed_token_ids": (ChatRequest, of(allowed_token_ids=[{}] * MANY)),
    "bad_words": (ChatRequest, of(bad_words=[{}] * MANY)),
    "guided_choice": (ChatRequest, of(guided_choice=[{}] * MANY)),
    "logit_bias": (ChatRequest, of(logit_bias={str(index): "x" for index in range(MANY)})),
    "unknown fields": (ChatRequest, of(**names("field"))),
    "near misses": (ChatRequest, of(**names("temperatur"))),
    "unknown fields of a message": (ChatRequest, {"messages": [{**USER[0], **names("field")}]}),
    "unknown fields of a part": (ChatRequest, part(type="text", text="x", **names("field"))),
    "frames": (ChatRequest, part(type="video", video=[{}] * MANY)),
    "embeddings": (ChatRequest, part(type="image_embeds", image_embeds=names("tensor"))),
    "tokens": (DetokenizeRequest, {"tokens": [{}] * MANY}),
    "prompts": (CompletionRequest, {"prompt": [{}] * MANY}),
    "prompts of nothing": (CompletionRequest, {"prompt": [[]] * MANY}),
    "inputs": (EmbeddingRequest, {"input": [{}] * MANY}),
}


@pytest.mark.parametrize("name", BODIES)
def test_faults_are_not_counted_by_the_thousand(name: str) -> None:
    model, content = BODIES[name]
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(json.dumps(content))
    assert caught.value.error_count() <= 2 * MAX_FAULTS
    assert len(str(body.refused(caught.value))) < 500


def test_a_few_unknown_fields_are_named_one_by_one(server: Running) -> None:
    answer = server.post("/v1/chat/completions", of(temperatur=1))
    assert "did you mean 'temperature'" in answer.json()["error"]["message"]
    answer = server.post(
        "/v1/chat/completions", of(**{f"field{index}": 1 for index in range(MAX_FAULTS + 2)})
    )
    assert answer.status_code == 400
    assert "field0, field1, field2, field3, field4; and 2 more" in answer.json()["error"]["message"]


def test_more_values_than_any_prompt_has_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_MAX_JSON_VALUES", 1000)
    body.validated(CompletionRequest, json.dumps({"prompt": [1] * 990}).encode())
    with pytest.raises(ApiError, match="too many values; at most 1000"):
        body.validated(CompletionRequest, json.dumps({"prompt": [1] * 1001}).encode())


def test_a_picture_is_one_value_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_MAX_JSON_VALUES", 1000)
    url = "data:image/png;base64," + "A" * 10_000
    body.validated(ChatRequest, json.dumps(part(type="image_url", image_url={"url": url})).encode())
