"""Embeddings against recorded ones, in every form of asking, over a real socket."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from safetensors.numpy import load_file

from opsin import LLM
from opsin.server.settings import ServerSettings
from tests.server.in_thread import Running, golden_config, running
from tests.server.messages import IMAGES, data_url, image, text, user
from tests.server.pictures import picture
from tests.server.process import GOLDEN

EXAMPLES = Path(__file__).parents[2] / "examples"
DSE, VLM2VEC = "dse", "vlm2vec"
RECORDED = [
    (DSE, "qwen2vl", "embed_dse_document"),
    (DSE, "qwen2vl", "embed_dse_query"),
    (VLM2VEC, "phi3v", "embed_image"),
    (VLM2VEC, "phi3v", "embed_text"),
]
"""Served model, folder of recorded cases, case."""


@pytest.fixture(scope="module")
def client(embedder: Running) -> openai.OpenAI:
    return embedder.client()


@pytest.fixture(scope="module")
def vlm2vec() -> Iterator[Running]:
    """Embeds with the recorded Phi-3-vision, as VLM2Vec does."""
    template = str(EXAMPLES / "template_vlm2vec.jinja")
    config = golden_config(
        model=str(GOLDEN / "phi3v" / "model"), task="embed", chat_template=template, max_model_len=1024
    )
    with running(config, ServerSettings(served_model_name=(VLM2VEC,))) as started:
        yield started


@pytest.fixture
def asked(model: str, request: pytest.FixtureRequest) -> Running:
    """The server of a model."""
    found: Running = request.getfixturevalue({DSE: "embedder", VLM2VEC: "vlm2vec"}[model])
    return found


def recorded(family: str, name: str) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """A case, and its embedding."""
    folder = GOLDEN / family / "cases" / name
    data: dict[str, Any] = json.loads((folder / "case.json").read_text())
    return data, load_file(folder / "tensors.safetensors")["pooled_last_l2"].reshape(-1)


def as_messages(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The case as one message: its pictures, then its words."""
    words = re.split(r"<\|vision_end\|>|<\|image_1\|> ", data["prompt"])[-1].split("<|im_end|>")[0]
    return user(*[image(data_url(name)) for name in data["images"]], text(words))


@pytest.mark.parametrize(("model", "family", "name"), RECORDED)
def test_recorded_embeddings(asked: Running, model: str, family: str, name: str) -> None:
    data, expected = recorded(family, name)
    body = {"model": model, "messages": as_messages(data), "encoding_format": "float"}
    options = data.get("mm_processor_kwargs")
    answer = asked.post("/v1/embeddings", {**body, "mm_processor_kwargs": options}).json()
    found = np.array(answer["data"][0]["embedding"])
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5
    assert abs(np.linalg.norm(found) - 1) < 1e-6
    count = len(data["prompt_token_ids"])
    cached = answer["usage"].pop("prompt_tokens_details")["cached_tokens"]
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0}

    again = asked.post("/v1/embeddings", {**body, "mm_processor_kwargs": options}).json()
    assert np.allclose(again["data"][0]["embedding"], found, atol=1e-6)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= max(cached, count - 32), "the caches"


@pytest.mark.parametrize(("model", "family", "name"), RECORDED)
def test_chat_form_is_the_rendered_prompt_offline(asked: Running, model: str, family: str, name: str) -> None:
    """The template's prompt and the pictures through `LLM.embed`, the messages through the server."""
    data, expected = recorded(family, name)
    options = data.get("mm_processor_kwargs") or {}
    body = {"messages": as_messages(data), "mm_processor_kwargs": options}
    by_chat = asked.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    prompt = {
        "prompt": data["prompt"],
        "multi_modal_data": {"image": [Image.open(IMAGES / picture) for picture in data["images"]]},
        "mm_processor_kwargs": options,
    }
    with LLM(
        str(GOLDEN / family / "model"),
        task="embed",
        dtype="float32",
        kv_cache_memory=2**23,
        max_model_len=1024,
    ) as llm:
        [output] = llm.embed(prompt, use_tqdm=False)
        [encoded] = llm.encode(prompt, use_tqdm=False)
    assert output.outputs is not None
    assert encoded.outputs is not None
    assert np.abs(np.array(output.outputs.embedding) - expected).max() <= 1e-5
    assert np.allclose(encoded.outputs.embedding, output.outputs.embedding, atol=1e-6)
    assert np.allclose(by_chat, output.outputs.embedding, atol=1e-6)


def test_a_recorded_prompt_without_pictures(vlm2vec: Running) -> None:
    """As ``input``: text, its token ids, and in base64."""
    data, expected = recorded("phi3v", "embed_text")
    for given in (data["prompt"], [data["prompt"]], data["prompt_token_ids"]):
        answer = vlm2vec.post("/v1/embeddings", {"input": given, "encoding_format": "base64"}).json()
        found = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
        assert np.abs(found - expected).max() <= 1e-5


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
