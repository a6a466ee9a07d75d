"""schemathesis over /openapi.json: whatever is asked, no answer is a 5xx, and the server lives on."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

from tests.server.in_thread import Running

OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/score"),
    ("POST", "/v1/rerank"),
    ("POST", "/pooling"),
    ("GET", "/ping"),
    ("GET", "/load"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/{response_id}"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]
HELLO = [{"role": "user", "content": "Hello"}]
SOURCES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/embeddings": {"input": "Hello", "messages": HELLO},
    "/v1/score": {"queries": "Hello"},
    "/v1/rerank": {"query": "Hello"},
    "/pooling": {"input": "Hello", "messages": HELLO},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": HELLO},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/tokenize": {"prompt": "Hello", "messages": HELLO},
    "/detokenize": {"tokens": [7]},
}
"""What a body is about; of several only one may be there."""

BESIDE: dict[str, dict[str, Any]] = {
    "/v1/score": {"documents": ["Hello"]},
    "/v1/rerank": {"documents": ["Hello"]},
}
"""What has to be there as well."""

LENGTHS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
EMBEDDING = ("/v1/embeddings", "/v1/score", "/v1/rerank", "/pooling")
VOCABULARY = 608
OPENAI_ERROR = {"message", "type", "param", "code"}


def tamed(path: str, body: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """A body of which more comes through: few fields at a time, and what the schema cannot say put right."""
    sources = SOURCES[path]
    source = data.draw(st.sampled_from(sorted(set(sources) & set(body)) or sorted(sources)))
    others = sorted(set(body) - set(sources) - set(LENGTHS.get(path, ())) - {"model", "text_1", "text_2"})
    kept = data.draw(st.lists(st.sampled_from(others), max_size=3)) if others else []
    subject = body.get(source, sources[source])
    if source == "messages":
        for message in subject:
            if isinstance(message, dict) and not message.get("content"):
                message["content"] = "Hello"
    else:
        subject = in_vocabulary(subject)
    body = {source: subject, **{name: body[name] for name in kept}, **BESIDE.get(path, {})}
    if path in LENGTHS:
        body[LENGTHS[path][0]] = 2
    return body


def in_vocabulary(value: Any) -> Any:
    """Token ids, however deep in lists, put into their range."""
    if isinstance(value, list):
        return [in_vocabulary(item) for item in value]
    return value % VOCABULARY if type(value) is int else value


def attack(server: Running, method: str, path: str, examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path][method]
    modes = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(modes), st.sampled_from([True, True, False]), st.data())
    def ask(case: Any, tame: bool, data: st.DataObject) -> None:
        if method == "GET":  # takes nothing; given something all the same
            case.query = data.draw(st.dictionaries(st.text(), st.text(), max_size=3))
        elif tame and isinstance(case.body, dict):
            with contextlib.suppress(AttributeError, TypeError, ValueError):  # too wild to be tamed
                case.body = tamed(path, case.body, data)
        elif path in LENGTHS and isinstance(case.body, dict):
            case.body = {LENGTHS[path][0]: 2, **case.body}
            for name in LENGTHS[path]:  # valid, but long
                if type(case.body.get(name)) is int and case.body[name] > 2:
                    case.body[name] = 2
        response = case.call(timeout=60)
        case.validate_response(response, checks=[not_a_server_error])
        statuses[response.status_code] += 1
        if response.status_code >= 400 and method == "POST":
            inside = {"message", "type"} if path.startswith("/v1/messages") else OPENAI_ERROR
            assert set(response.json()["error"]) == inside

    ask()
    assert sum(statuses.values()) >= examples
    assert "{" in path or statuses[200] > 0, f"no example came through: {statuses}"
    server.wait_idle()
    asked = "/v1/embeddings" if path in EMBEDDING else "/v1/chat/completions"
    answer = server.post(asked, {"messages": HELLO})
    assert answer.status_code == 200, answer.text


@pytest.fixture
def target(path: str, request: pytest.FixtureRequest) -> Running:
    """A server that does what the path is for."""
    found: Running = request.getfixturevalue("embedder" if path in EMBEDDING else "server")
    return found


def test_the_schema_has_every_operation(server: Running) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    found = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_input_is_a_server_error(target: Running, method: str, path: str) -> None:
    attack(target, method, path, 20)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_input_is_a_server_error_thoroughly(target: Running, method: str, path: str) -> None:
    attack(target, method, path, 150)
