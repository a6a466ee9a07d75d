"""Every field that clients of other servers send is taken, and the defaults are the model's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.server.in_thread import MODEL, Running, golden_config, running
from tests.server.messages import CAT, data_url, image, text, user

CHAT, COMPLETE, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}

SHARED: dict[str, list[Any]] = {
    "model": ["golden", None],
    "n": [1, 2],
    "temperature": [0, 0.5],
    "top_p": [0.9],
    "top_k": [5, 0, -1],
    "min_p": [0.1],
    "seed": [1, -(2**63), 2**63 - 1],
    "stop": ["x", ["x", "y"], None],
    "stop_token_ids": [[5]],
    "include_stop_str_in_output": [True],
    "ignore_eos": [True],
    "min_tokens": [1],
    "presence_penalty": [0.5],
    "frequency_penalty": [-0.5],
    "repetition_penalty": [1.1],
    "logit_bias": [{"5": -100}],
    "prompt_logprobs": [0, 2],
    "stream": [False, None],
    "response_format": [{"type": "text"}],
    "user": ["somebody"],
    "cache_salt": ["salt"],
    "priority": [0, None],
    "skip_special_tokens": [False],
    "best_of": [2],
    "use_beam_search": [True, False],
    "echo": [False],
}
CHATS: dict[str, list[Any]] = {
    **SHARED,
    "max_completion_tokens": [3],
    "logprobs": [True, False],
    "tools": [[TOOL], []],
    "tool_choice": ["none", "auto"],
    "add_generation_prompt": [True, False],
    "continue_final_message": [False],
    "chat_template_kwargs": [{"add_vision_id": True}],
    "mm_processor_kwargs": [{"max_pixels": 28 * 28 * 8}, {}],
}
EMBEDDINGS: dict[str, list[Any]] = {
    "model": ["dse", None],
    "encoding_format": ["float", "base64"],
    "dimensions": [8],
    "truncate_prompt_tokens": [4, -1],
    "user": ["somebody"],
}


def cases(fields: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param({name: value}, id=f"{name}={str(value)[:20]}")
        for name, values in fields.items()
        for value in values
    ]


@pytest.mark.parametrize("field", cases(CHATS))
def test_chat(server: Running, field: Any) -> None:
    body = {"messages": user(image(data_url(CAT)), text("?")), "max_tokens": 2, **field}
    answer = server.post(CHAT, body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == field.get("n", 1)


@pytest.mark.parametrize("field", cases(SHARED))
def test_completions(server: Running, field: Any) -> None:
    answer = server.post(COMPLETE, {"prompt": "Hello", "max_tokens": 2, **field})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == field.get("n", 1)


@pytest.mark.parametrize("field", cases(EMBEDDINGS))
def test_embeddings(embedder: Running, field: Any) -> None:
    answer = embedder.post(EMBED, {"input": "one two three four five", **field})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 0


def test_priority_where_the_server_was_told_to_look_at_it() -> None:
    with running(golden_config(scheduling_policy="priority")) as server:
        for path, prompt in ((CHAT, {"messages": user("Hello")}), (COMPLETE, {"prompt": "Hello"})):
            answer = server.post(path, {**prompt, "max_tokens": 2, "priority": -3})
            assert answer.status_code == 200, answer.text


def sampled(server: Running, **options: Any) -> str:
    body = {"messages": user("Hello"), "max_tokens": 30, "seed": 3, "ignore_eos": True, **options}
    content: str = server.post(CHAT, body).json()["choices"][0]["message"]["content"]
    return content


FREE = {"temperature": 1, "top_p": 1, "top_k": 0}


def test_defaults_are_those_of_the_generation_config(server: Running) -> None:
    """The recorded one all but says "greedy"."""
    assert sampled(server) == sampled(server, temperature=0) != sampled(server, **FREE)


def test_temperature_is_1_where_the_generation_config_says_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    path = folder / "generation_config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps({"eos_token_id": given["eos_token_id"]}))
    with running(golden_config(model=str(folder))) as server:
        assert sampled(server) == sampled(server, **FREE) != sampled(server, temperature=0)
        assert sampled(server) != sampled(server, temperature=2)
