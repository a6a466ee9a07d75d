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
SOURCES = {
    "/v1/chat/completions": {"messages"},
    "/v1/completions": {"prompt"},
    "/v1/embeddings": {"input", "messages"},
    "/tokenize": {"prompt", "messages"},
    "/detokenize": {"tokens"},
}
"""What a body is about; of several only one may be there."""


def tamed(path: str, body: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """A body of which more comes through: few fields at a time, and what the schema cannot say put right."""
    source = data.draw(st.sampled_from(sorted(SOURCES[path] & set(body)) or ["absent"]))
    others = sorted(set(body) - SOURCES[path] - {"model", "max_tokens", "max_completion_tokens"})
    kept = data.draw(st.lists(st.sampled_from(others), max_size=3)) if others else []
    body = {name: body[name] for name in [source, *kept] if name in body}
    for message in body.get("messages") or ():
        if isinstance(message, dict) and not message.get("content"):
            message["content"] = "Hello"
    if "tokens" in body:
        body["tokens"] = [token % 608 for token in body["tokens"]]
    if path in ("/v1/chat/completions", "/v1/completions"):
        body["max_tokens"] = 2
    return body


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
        if tame and isinstance(case.body, dict):
            with contextlib.suppress(AttributeError, TypeError, ValueError):  # too wild to be tamed
                case.body = tamed(path, case.body, data)
        response = case.call(timeout=60)
        case.validate_response(response, checks=[not_a_server_error])
        statuses[response.status_code] += 1
        if response.status_code >= 400 and method == "POST":
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    ask()
    assert statuses[200] > 0, f"no example came through: {statuses}"
    server.wait_idle()
    answer = server.post("/tokenize", {"prompt": "Hello"})
    assert answer.status_code == 200


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
