"""Fields that no one knows: refused, or ignored where the operator says so."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from opsin.server.settings import RequestLimits, ServerSettings
from tests.server.in_thread import Running, golden_config, running
from tests.server.messages import CAT, data_url

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
PICTURE = {"type": "image_url", "image_url": {"url": data_url(CAT), "zoom": 3}, "weight": 1}
NESTED: dict[str, Any] = {
    "messages": [
        {
            "role": "user",
            "content": [PICTURE, {"type": "text", "text": "What?", "speaker": "me"}],
            "mood": "glad",
        }
    ],
    "max_tokens": 2,
    "cachePolicy": {"a": 1},
}


@pytest.fixture(scope="module", params=["refuse", "ignore"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(mode: str) -> Iterator[Running]:
    limits = RequestLimits(unknown_fields=mode)  # type: ignore[arg-type]
    config = golden_config(limit_mm_per_prompt={"image": 2})
    with running(config, ServerSettings(limits=limits, any_model_name=True)) as started:
        yield started


@pytest.mark.parametrize("body", [{**CHAT, "frobnicate": 1}, NESTED], ids=["at the top", "nested"])
def test_far_names(
    mode: str, server: Running, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    known = {name: value for name, value in body.items() if name in ("messages", "max_tokens")}
    with caplog.at_level(logging.WARNING, "opsin.server.http.body"):
        answer = server.post("/v1/chat/completions", body)
    if mode == "refuse":
        assert answer.status_code == 400
        assert "unknown field" in answer.json()["error"]["message"]
        return
    assert answer.status_code == 200, answer.text
    said = caplog.text
    names = ("frobnicate",) if "frobnicate" in body else ("zoom", "weight", "speaker", "mood", "cachePolicy")
    assert all(name in said for name in names), said
    plain: Any = known
    if body is NESTED:
        content = [
            {"type": "image_url", "image_url": {"url": data_url(CAT)}},
            {"type": "text", "text": "What?"},
        ]
        plain = {**known, "messages": [{"role": "user", "content": content}]}
    alike = server.post("/v1/chat/completions", plain).json()
    assert answer.json()["choices"] == alike["choices"]
    assert answer.json()["usage"]["prompt_tokens"] == alike["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"temprature": 0}, "did you mean 'temperature'"),
        ({"frobnicate": 1, "top_p": 7}, "top_p"),
        ({"prompt_embeds": "x"}, "not supported"),
        ({f"x{i}": 0 for i in range(9)}, "unknown fields"),
    ],
)
def test_what_is_refused_in_either_mode(server: Running, field: dict[str, Any], says: str) -> None:
    """Nearly right names, fields with an effect, names by the dozen, and what is wrong besides."""
    answer = server.post("/v1/chat/completions", {**CHAT, **field})
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_other_routes(mode: str, server: Running) -> None:
    bodies = {
        "/v1/completions": {"prompt": "a", "max_tokens": 1},
        "/tokenize": {"prompt": "a"},
        "/v1/responses": {"input": "a", "max_output_tokens": 2},
        "/v1/messages": {"model": "golden", "messages": CHAT["messages"], "max_tokens": 1},
    }
    for path, body in bodies.items():
        status = server.post(path, {**body, "frobnicate": 1}).status_code
        assert status == (200 if mode == "ignore" else 400), path
