"""``opsin bench serve`` against a real server on a socket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opsin.bench import serving
from opsin.bench.settings import PromptSettings, ServeSettings
from opsin.cli import main
from opsin.server.settings import ServerSettings
from tests.server.in_thread import Running, golden_config, running

REQUESTS = PromptSettings(image_size="56", input_len=6, output_len=5)


def load(server: Running, **settings: object) -> ServeSettings:
    """Settings for this server."""
    return ServeSettings(base_url=server.url, **settings)  # type: ignore[arg-type]


def test_every_request_is_answered_and_timed(server: Running) -> None:
    found = serving.measure("golden", load(server, num_prompts=6), REQUESTS)
    assert found.failures == []
    assert [t.num_output_tokens for t in found.timings] == [5] * 6
    for timing in found.timings:
        assert timing.first_token is not None
        assert 0 < timing.first_token <= timing.total
        assert timing.num_prompt_tokens > 6
        # Text of several tokens may come as one piece, never the other way round.
        assert timing.first_token + sum(timing.gaps) <= timing.total
        assert len(timing.gaps) < 5


def test_no_more_wait_than_max_concurrency_allows(server: Running) -> None:
    found = serving.measure("golden", load(server, num_prompts=6, max_concurrency=2), REQUESTS)
    assert len(found.timings) == 6
    assert found.more["most_at_a_time"] <= 2


def test_requests_come_at_their_times(server: Running) -> None:
    settings = load(server, num_prompts=4, request_rate="40")
    found = serving.measure("golden", settings, REQUESTS)
    for timing, at in zip(sorted(found.timings, key=lambda t: t.arrival), serving.arrival_times(settings)):
        assert timing.arrival >= at


def test_which_models_there_are_is_said(server: Running) -> None:
    with pytest.raises(serving.ServerError, match="golden, golden-too"):
        serving.measure("other", load(server), REQUESTS)
    with pytest.raises(serving.ServerError, match="say which model"):
        serving.measure(None, load(server), REQUESTS)


def test_what_the_server_refuses_is_told_in_its_words(server: Running) -> None:
    with pytest.raises(serving.ServerError, match="first request failed: status 400"):
        serving.measure("golden", load(server), PromptSettings(num_images=9, image_size="28"))


def test_failures_are_counted_when_others_are_answered(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(asked: serving._Server, conversation: object, requests: PromptSettings) -> bytes:
        made = json.loads(usual(asked, conversation, requests))  # type: ignore[arg-type]
        bodies.append(made)
        return json.dumps({**made, "temperature": -1} if len(bodies) == 2 else made).encode()

    bodies: list[object] = []
    usual = serving._body
    monkeypatch.setattr(serving, "_body", body)
    found = serving.measure("golden", load(server, num_prompts=3), REQUESTS)
    assert len(found.timings) == 2
    assert len(found.failures) == 1
    assert "temperature" in found.failures[0]


def test_a_key_is_asked_for_and_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with running(golden_config(), ServerSettings(api_key=("secret",))) as server:
        arguments = ["bench", "serve", "--base-url", f"{server.url}/v1", "--num-prompts", "2"]
        arguments += ["--image-size", "56", "--input-len", "4", "--output-len", "3"]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 1
        assert "OPENAI_API_KEY" in capsys.readouterr().err
        saved = ["--api-key", "secret", "--save-result", "--result-dir", str(tmp_path)]
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *saved, "--result-filename", "found.json"])
        assert not ended.value.code
        text = (tmp_path / "found.json").read_text()
        assert json.loads(text)["completed"] == 2
        assert "secret" not in text
        out = capsys.readouterr().out
        assert "between tokens" in out
        assert "p99" in out
