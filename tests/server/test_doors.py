"""The doors that clients of other servers try: other paths, one model, scores, rankings, plain vectors."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import requests

from opsin import LLM
from tests.server.in_thread import MODEL, Running
from tests.server.messages import user

TEXTS = ["a red circle", "a blue square", "something else entirely"]


def test_one_model_by_its_name(server: Running) -> None:
    client = server.client()
    assert client.models.retrieve("golden-too").id == "golden-too"
    with pytest.raises(openai.NotFoundError, match="served: golden, golden-too"):
        client.models.retrieve("owner/other")


def test_paths_without_a_version(server: Running) -> None:
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    assert client.models.list().data[0].id == "golden"
    answer = client.chat.completions.create(model="golden", messages=user("Hello"), max_tokens=2)
    assert answer.usage is not None
    assert client.completions.create(model="golden", prompt="Hello", max_tokens=2).choices


@pytest.mark.parametrize(
    "path", ["/health", "/ping", "/ready", "/version", "/load", "/v1/models", "/models", "/metrics"]
)
def test_heads_are_gets_without_a_body(server: Running, path: str) -> None:
    head, get = requests.head(server.url + path, timeout=10), server.get(path)
    assert head.status_code == get.status_code == 200
    assert not head.content
    assert head.headers["content-type"] == get.headers["content-type"]


def test_the_load_is_what_is_computed(server: Running) -> None:
    assert server.get("/load").json() == {"server_load": 0}


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], float]:
    with LLM(MODEL, task="embed", dtype="float32", kv_cache_memory=2**23) as llm:
        pairs = [(one, other) for one in TEXTS for other in TEXTS]
        found = llm.score([one for one, _ in pairs], [other for _, other in pairs], use_tqdm=False)
    return {pair: output.outputs.score for pair, output in zip(pairs, found, strict=True)}


def post(embedder: Running, path: str, **body: Any) -> Any:
    response = embedder.post(path, body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents")])
def test_scores(
    embedder: Running, expected: dict[tuple[str, str], float], path: str, names: tuple[str, str]
) -> None:
    first, second = names
    answer = post(embedder, path, model="dse", **{first: TEXTS[0], second: TEXTS})
    assert [item["score"] for item in answer["data"]] == pytest.approx(
        [expected[TEXTS[0], text] for text in TEXTS], abs=1e-4
    )
    pairs = post(embedder, path, **{first: TEXTS, second: TEXTS[::-1]})
    assert [item["score"] for item in pairs["data"]] == pytest.approx(
        [expected[pair] for pair in zip(TEXTS, TEXTS[::-1])], abs=1e-4
    )


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_rankings(embedder: Running, expected: dict[tuple[str, str], float], path: str) -> None:
    documents = [TEXTS[2], {"text": TEXTS[0]}, TEXTS[1]]
    answer = post(embedder, path, query=TEXTS[0], documents=documents, top_n=2)
    texts = [TEXTS[2], TEXTS[0], TEXTS[1]]
    order = sorted(range(3), key=lambda index: -expected[TEXTS[0], texts[index]])[:2]
    assert [result["index"] for result in answer["results"]] == order
    assert answer["results"][0]["document"] == {"text": TEXTS[0]}
    assert answer["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-5)
    bare = post(embedder, path, query=TEXTS[0], documents=documents, return_documents=False)
    assert len(bare["results"]) == 3
    assert "document" not in bare["results"][0]


def test_plain_vectors(embedder: Running) -> None:
    pooled = post(embedder, "/pooling", input=TEXTS)
    embedded = post(embedder, "/v1/embeddings", input=TEXTS)
    for one, other in zip(pooled["data"], embedded["data"], strict=True):
        assert one["data"] == pytest.approx(other["embedding"], abs=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/score", {"text_1": "a"}, "expected either text_1 and text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "queries": "c"}, "expected either text_1 and text_2"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "2 and 3 texts"),
        ("/v1/score", {"text_1": "a", "text_2": [""]}, "at least 1"),
        ("/v1/rerank", {"query": "a", "documents": []}, "at least 1"),
        ("/v1/rerank", {"query": "a", "documents": ["b"] * 9}, "at most 8 texts"),
        ("/pooling", {"input": "a", "encoding_format": "base64"}, "encoding_format"),
        ("/pooling", {"input": "a", "inptu": "b"}, "did you mean 'input'"),
    ],
)
def test_what_cannot_be_compared(embedder: Running, path: str, body: dict[str, Any], message: str) -> None:
    response = embedder.post(path, body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_a_server_of_answers_says_so(server: Running) -> None:
    response = server.post("/v1/score", {"text_1": "a", "text_2": "b"})
    assert response.status_code == 400
    assert "--task embedding" in response.json()["error"]["message"]
