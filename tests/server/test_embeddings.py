"""Embeddings against recorded ones, in every form of asking."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
import openai
import pytest
from safetensors.numpy import load_file

from tests.server.in_thread import Running, golden_config, running
from tests.server.messages import data_url, image, text, user
from tests.server.pictures import picture
from tests.server.process import GOLDEN

CASES = GOLDEN / "qwen2vl" / "cases"


@pytest.fixture(scope="module")
def client(embedder: Running) -> openai.OpenAI:
    return embedder.client()


def case(name: str) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    data = json.loads((CASES / name / "case.json").read_text())
    tensors = load_file(CASES / name / "tensors.safetensors")
    [key] = [key for key in tensors if "pooled" in key]
    return data, tensors[key].reshape(-1)


def as_messages(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The case's messages with its pictures in them."""
    urls = iter([data_url(name) for name in data["images"]])
    return [
        {
            "role": message["role"],
            "content": [
                image(next(urls)) if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in data["messages"]
    ]


@pytest.mark.parametrize("name", ["embed_dse_document", "embed_dse_query"])
def test_recorded_embeddings(embedder: Running, name: str) -> None:
    data, expected = case(name)
    body = {"model": "dse", "messages": as_messages(data), "encoding_format": "float"}
    answer = embedder.post("/v1/embeddings", body).json()
    found = np.array(answer["data"][0]["embedding"])
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5
    assert abs(np.linalg.norm(found) - 1) < 1e-6
    count = len(data["prompt_token_ids"])
    assert answer["usage"] == {
        "prompt_tokens": count,
        "total_tokens": count,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": answer["usage"]["prompt_tokens_details"]["cached_tokens"]},
    }


def test_chat_form_is_the_rendered_prompt(embedder: Running) -> None:
    messages = user("Query: a cup of coffee")
    by_chat = embedder.post("/v1/embeddings", {"messages": messages}).json()
    tokens = embedder.post("/tokenize", {"messages": messages}).json()["tokens"]
    prompt = embedder.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert prompt.endswith("<|im_start|>assistant\n<|endoftext|>")
    for rendered in (prompt, [prompt], tokens, [tokens]):
        by_prompt = embedder.post("/v1/embeddings", {"input": rendered}).json()
        assert np.allclose(by_prompt["data"][0]["embedding"], by_chat["data"][0]["embedding"], atol=1e-6)


def test_float_is_base64(client: openai.OpenAI, embedder: Running) -> None:
    texts = ["one", "two", "three"]
    as_float = client.embeddings.create(model="dse", input=texts, encoding_format="float")
    as_base64 = client.embeddings.create(model="dse", input=texts, encoding_format="base64")
    by_default = client.embeddings.create(model="dse", input=texts)  # base64, decoded by the client
    for number, (one, two, three) in enumerate(zip(as_float.data, as_base64.data, by_default.data)):
        decoded = np.frombuffer(base64.b64decode(two.embedding), "<f4")  # type: ignore[arg-type]
        assert decoded.astype(float).tolist() == one.embedding
        assert three.embedding == one.embedding
        assert one.index == two.index == number
    assert as_float.object == "list"
    assert as_float.usage.total_tokens == as_float.usage.prompt_tokens > 0


def test_a_batch_is_its_members(client: openai.OpenAI) -> None:
    texts = ["one", "two and more", "three and more and even more"]
    together = client.embeddings.create(model="dse", input=texts, encoding_format="float").data
    for entry, words in zip(together, texts):
        alone = client.embeddings.create(model="dse", input=words, encoding_format="float").data[0]
        assert np.allclose(alone.embedding, entry.embedding, atol=1e-6)


def test_dimensions_are_the_first_ones_normalised(client: openai.OpenAI) -> None:
    whole = np.array(
        client.embeddings.create(model="dse", input="x", encoding_format="float").data[0].embedding
    )
    short = client.embeddings.create(model="dse", input="x", encoding_format="float", dimensions=16)
    expected = whole[:16] / np.linalg.norm(whole[:16])
    assert np.allclose(short.data[0].embedding, expected, atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="64 dimensions"):
        client.embeddings.create(model="dse", input="x", dimensions=65)


def test_truncation_keeps_the_end(embedder: Running) -> None:
    ids = embedder.post("/tokenize", {"prompt": "one two three four"}).json()["tokens"]
    cut = embedder.post(
        "/v1/embeddings", {"input": ["one two three four"], "truncate_prompt_tokens": 2}
    ).json()
    last = embedder.post("/v1/embeddings", {"input": ids[-2:]}).json()
    assert cut["usage"]["prompt_tokens"] == 2
    assert np.allclose(cut["data"][0]["embedding"], last["data"][0]["embedding"], atol=1e-6)
    fits = embedder.post("/v1/embeddings", {"input": [7] * 5000, "truncate_prompt_tokens": -1}).json()
    assert fits["usage"]["prompt_tokens"] == 2048


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, 'either "input" or "messages"'),
        ({"input": "a", "messages": user("b")}, 'either "input" or "messages"'),
        ({"input": ""}, "none of them empty"),
        ({"input": []}, "none of them empty"),
        ({"input": ["a", ""]}, "none of them empty"),
        ({"input": [[1], []]}, "none of them empty"),
        ({"input": [1, "a"]}, "expected a text"),
        ({"input": [99999]}, "out of vocabulary"),
        ({"input": ["fine", [1]]}, "expected a text"),
        ({"input": ["x"] * 9}, "at most 8 inputs"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "truncate_prompt_tokens": 5000}, "2048"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "-1"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": [7] * 2049}, "2049 tokens.*2048"),
        ({"messages": user("x"), "truncate_prompt_tokens": 3}, "not truncated"),
        ({"input": "x", "mm_processor_kwargs": {"max_pixels": 5}}, "use messages"),
    ],
)
def test_bad_requests(embedder: Running, body: Any, message: str) -> None:
    answer = embedder.post("/v1/embeddings", body)
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"]["message"])
    embedder.wait_idle()
    assert embedder.engine.stats().kv_blocks_used == 0


def test_an_embedding_server_does_not_chat(embedder: Running) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": user("x")}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        answer = embedder.post(path, body)
        assert answer.status_code == 400
        assert "--task generate" in answer.json()["error"]["message"]


def test_other_pooling() -> None:
    config = golden_config(task="embed", pooling_type="mean", normalize=False)
    with running(config) as mean:
        found = mean.post("/v1/embeddings", {"input": "one two"}).json()["data"][0]["embedding"]
        assert abs(np.linalg.norm(found) - 1) > 0.1


def test_picture_counts_and_text_only_query(embedder: Running) -> None:
    """A text query carries a placeholder picture of the smallest size, as the model was trained."""
    query = user(image(data_url(picture((56, 56)))), text("Query: coffee"))
    answer = embedder.post("/v1/embeddings", {"messages": query}).json()
    assert abs(np.linalg.norm(answer["data"][0]["embedding"]) - 1) < 1e-6
    without = embedder.post("/v1/embeddings", {"messages": user("Query: coffee")}).json()
    assert answer["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"] + 4 + 2, "2 x 2 and its ends"
