"""Completions through OpenAI's client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.server.in_thread import Running

OPTIONS: Any = {"model": "golden", "temperature": 0, "max_tokens": 6}


def test_several_prompts_in_every_form(client: openai.OpenAI, server: Running) -> None:
    texts = ["Hello", "One two three"]
    ids = [server.post("/tokenize", {"prompt": text}).json()["tokens"] for text in texts]
    by_text = client.completions.create(prompt=texts, **OPTIONS)
    by_ids = client.completions.create(prompt=ids, **OPTIONS)
    one_by_one = [client.completions.create(prompt=prompt, **OPTIONS) for prompt in (*texts, *ids)]
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_ids.choices]
    assert [answer.choices[0].text for answer in one_by_one] == [c.text for c in by_text.choices] * 2
    assert by_text.usage.prompt_tokens == sum(map(len, ids))
    assert by_text.usage.completion_tokens == 12
    assert by_text.object == "text_completion"


def test_samples_of_several_prompts_are_numbered(client: openai.OpenAI) -> None:
    options = {**OPTIONS, "temperature": 1.5, "n": 2, "seed": 1, "extra_body": {"top_k": 0, "top_p": 1.0}}
    answer = client.completions.create(prompt=["Hello", "Two"], **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_is_not_streamed(client: openai.OpenAI, echo: bool) -> None:
    options = {**OPTIONS, "prompt": ["Hello", "Two"], "logprobs": 2, "echo": echo}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert [c.finish_reason for c in own][-1] == choice.finish_reason
        logprobs = [c.logprobs for c in own if c.logprobs is not None]
        assert [t for entry in logprobs for t in entry.tokens] == choice.logprobs.tokens
        assert [t for entry in logprobs for t in entry.token_logprobs] == choice.logprobs.token_logprobs
        assert [t for entry in logprobs for t in entry.top_logprobs] == choice.logprobs.top_logprobs
        assert [t for entry in logprobs for t in entry.text_offset] == [
            offset - choice.logprobs.text_offset[0] for offset in choice.logprobs.text_offset
        ]


def test_token_ids(client: openai.OpenAI, server: Running) -> None:
    """vLLM's `return_token_ids`, in completions and chats: streamed pieces add up to the whole."""
    prompts = ["Hello", "Two three"]
    ids = [server.post("/tokenize", {"prompt": text}).json()["tokens"] for text in prompts]
    options: Any = {**OPTIONS, "prompt": prompts, "n": 2, "extra_body": {"return_token_ids": True}}
    whole = client.completions.create(**options)
    chunks = [
        choice for chunk in client.completions.create(**options, stream=True) for choice in chunk.choices
    ]
    for choice in whole.choices:
        own = [each for each in chunks if each.index == choice.index]
        assert choice.prompt_token_ids == own[0].prompt_token_ids == ids[choice.index // 2]
        assert len(choice.token_ids) == 6
        pieces = [getattr(each, "token_ids", None) or [] for each in own]
        assert [i for piece in pieces for i in piece] == choice.token_ids
    assert (
        "token_ids"
        not in server.post("/v1/completions", {"model": "golden", "prompt": "a"}).json()["choices"][0]
    )
    scored = {"model": "golden", "prompt": "a", "max_tokens": 0, "echo": True, "return_token_ids": True}
    assert server.post("/v1/completions", scored).json()["choices"][0]["token_ids"] == []

    chat: Any = {"model": "golden", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6}
    chat |= {"temperature": 0, "extra_body": {"return_token_ids": True}}
    answer = client.chat.completions.create(**chat)
    pieces = list(client.chat.completions.create(**chat, stream=True))
    assert pieces[0].prompt_token_ids == answer.prompt_token_ids
    assert len(answer.prompt_token_ids) == answer.usage.prompt_tokens
    streamed = [getattr(choice, "token_ids", None) or [] for piece in pieces for choice in piece.choices]
    assert [i for ids in streamed for i in ids] == answer.choices[0].token_ids
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI) -> None:
    """What evaluation harnesses ask for: the log-probabilities of a text, and nothing generated."""
    options = {**OPTIONS, "prompt": "Hello world", "echo": True, "logprobs": 1}
    scored = client.completions.create(**{**options, "max_tokens": 0})
    assert scored.choices[0].text == "Hello world"
    assert "".join(scored.choices[0].logprobs.tokens) == "Hello world"
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in scored.choices[0].logprobs.token_logprobs[1:])
    assert scored.choices[0].logprobs.text_offset[0] == 0
    assert scored.usage.completion_tokens == 0
    assert scored.usage.total_tokens == scored.usage.prompt_tokens
    longer = client.completions.create(**options)
    assert longer.choices[0].text.startswith("Hello world")
    count = len(scored.choices[0].logprobs.tokens)
    assert longer.choices[0].logprobs.tokens[:count] == scored.choices[0].logprobs.tokens
    assert len(longer.choices[0].logprobs.tokens) == count + 6
    streamed = client.completions.create(**{**options, "logprobs": None}, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == longer.choices[0].text


def test_truncation_keeps_the_end(client: openai.OpenAI, server: Running) -> None:
    ids = server.post("/tokenize", {"prompt": "One two three four five"}).json()["tokens"]
    cut = {"extra_body": {"truncate_prompt_tokens": 3}}
    short = client.completions.create(prompt="One two three four five", **OPTIONS, **cut)
    assert short.usage.prompt_tokens == 3
    assert short.choices[0].text == client.completions.create(prompt=ids[-3:], **OPTIONS).choices[0].text
    fits = {"extra_body": {"truncate_prompt_tokens": -1}}
    long = client.completions.create(prompt=[7] * 5000, **{**OPTIONS, "max_tokens": 1}, **fits)
    assert long.usage.total_tokens == 2048


def test_prompt_logprobs_and_beams(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="Hello", **OPTIONS, extra_body={"prompt_logprobs": 0})
    assert len(answer.choices[0].prompt_logprobs) == answer.usage.prompt_tokens
    beams = client.completions.create(prompt="Hello", **OPTIONS, n=2, extra_body={"use_beam_search": True})
    assert len({choice.text for choice in beams.choices}) == 2


def test_default_length_is_16(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="golden", prompt="Hello", extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
