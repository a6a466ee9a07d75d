"""Constrained output through the engine: what comes out fits, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opsin import LLM, SamplingParams
from opsin.errors import ConfigError, RequestError
from opsin.params import StructuredOutput

GOLDEN = Path(__file__).parents[1] / "golden"
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "shape": {"enum": ["a", "b"]}},
    "required": ["count", "shape"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(GOLDEN / "qwen2vl" / "model"), dtype="float32", kv_cache_memory=2**23) as loaded:
        yield loaded


def ask(llm: LLM, *wanted: StructuredOutput | None, **params: Any) -> list[str]:
    picture = Image.open(GOLDEN / "images" / "astronaut_96x96.png")
    prompt = {
        "prompt": "<|vision_start|><|image_pad|><|vision_end|>Say",
        "multi_modal_data": {"image": picture},
    }
    settings = [
        SamplingParams(**{"temperature": 1.0, "seed": 5, "max_tokens": 80, "structured": one, **params})
        for one in wanted
    ]
    outputs = llm.generate([prompt] * len(settings), settings, use_tqdm=False)
    return [sample.text for output in outputs for sample in output.outputs]


def test_each_form_is_kept_beside_free_requests_and_pictures(llm: LLM) -> None:
    chosen, matched, parsed, derived, free = ask(
        llm,
        StructuredOutput(choice=["red", "dark blue"]),
        StructuredOutput(regex="[0-9]{3}-[a-f]{2}"),
        StructuredOutput(json=SCHEMA),
        StructuredOutput(grammar='start: "x" ("y" | "z") "x"'),
        None,
    )
    assert chosen in ("red", "dark blue")
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", matched)
    value = json.loads(parsed)
    assert 0 <= value["count"] <= 99
    assert value["shape"] in ("a", "b")
    assert derived in ("xyx", "xzx")
    assert [free] == ask(llm, None), "a free request beside constrained ones is not touched"


def test_samples_of_one_request_are_constrained_each(llm: LLM) -> None:
    texts = ask(llm, StructuredOutput(regex="[0-9]{6}"), n=4, temperature=2.0)
    assert all(re.fullmatch("[0-9]{6}", text) for text in texts)
    assert len(set(texts)) > 1


def test_greedy_is_constrained_too(llm: LLM) -> None:
    assert ask(llm, StructuredOutput(choice=["yes", "no"]), temperature=0)[0] in ("yes", "no")


def test_preemption_does_not_lose_the_place() -> None:
    model = str(GOLDEN / "qwen2vl" / "model")
    with LLM(model, dtype="float32", kv_cache_memory=768 * 16 * 8, max_model_len=120) as tight:
        wanted = [StructuredOutput(regex="[0-9]{40}")] * 4
        texts = ask(tight, *wanted)
        assert tight.engine.stats().num_preemptions > 0
        assert all(re.fullmatch("[0-9]{40}", text) for text in texts)


@pytest.mark.parametrize(
    "wrong",
    [
        StructuredOutput(regex="("),
        StructuredOutput(json={"type": "nonsense"}),
        StructuredOutput(json="{not json"),
        StructuredOutput(grammar="start: undefined_rule"),
    ],
    ids=str,
)
def test_impossible_constraints_fail_their_own_request(llm: LLM, wrong: StructuredOutput) -> None:
    with pytest.raises(RequestError, match="constraint is not valid"):
        ask(llm, wrong)
    assert not llm.engine.has_unfinished()


def test_exactly_one_constraint() -> None:
    for wrong in ({}, {"regex": "a", "json": {}}, {"choice": []}, {"choice": [""]}):
        with pytest.raises(ConfigError, match="structured output"):
            StructuredOutput(**wrong)  # type: ignore[arg-type]
