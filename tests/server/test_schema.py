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
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]
HELLO = [{"role": "user", "content": "Hello"}]
SOURCES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/embeddings": {"input": "Hello", "messages": HELLO},
    "/tokenize": {"prompt": "Hello", "messages": HELLO},
    "/detokenize": {"tokens": [7]},
}
"""What a body is about; of several only one may be there."""

GENERATING = ("/v1/chat/completions", "/v1/completions")
VOCABULARY = 608


def tamed(path: str, body: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """A body of which more comes through: few fields at a time, and what the schema cannot say put right."""
    sources = SOURCES[path]
    source = data.draw(st.sampled_from(sorted(set(sources) & set(body)) or sorted(sources)))
    others = sorted(set(body) - set(sources) - {"model", "max_tokens", "max_completion_tokens"})
    kept = data.draw(st.lists(st.sampled_from(others), max_size=3)) if others else []
    subject = body.get(source, sources[source])
    if source == "messages":
        for message in subject:
            if isinstance(message, dict) and not message.get("content"):
                message["content"] = "Hello"
    else:
        subject = in_vocabulary(subject)
    body = {source: subject, **{name: body[name] for name in kept}}
    if path in GENERATING:
        body["max_tokens"] = 2
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
        elif path in GENERATING and isinstance(case.body, dict):
            case.body = {"max_tokens": 2, **case.body}
            for name in ("max_tokens", "max_completion_tokens"):  # valid, but long
                if type(case.body.get(name)) is int and case.body[name] > 2:
                    case.body[name] = 2
        response = case.call(timeout=60)
        case.validate_response(response, checks=[not_a_server_error])
        statuses[response.status_code] += 1
        if response.status_code >= 400 and method == "POST":
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    ask()
    assert sum(statuses.values()) >= examples
    assert statuses[200] > 0, f"no example came through: {statuses}"
    server.wait_idle()
    asked = path if path == "/v1/embeddings" else "/v1/chat/completions"
    answer = server.post(asked, {"messages": HELLO})
    assert answer.status_code == 200, answer.text


@pytest.fixture
def target(path: str, request: pytest.FixtureRequest) -> Running:
    """A server that does what the path is for."""
    found: Running = request.getfixturevalue("embedder" if path == "/v1/embeddings" else "server")
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
