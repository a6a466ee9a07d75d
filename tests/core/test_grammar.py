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
from opsin.inputs import grammar
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


def test_grammars_in_gbnf(llm: LLM) -> None:
    """As llama.cpp's clients send them: from `root`, with `::=`."""
    arithmetic = """
        root  ::= expr "=" num
        expr  ::= term ([-+*/] term)*   # a comment
        term  ::= num | "(" expr ")"
        num   ::= [0-9]{1,3}
    """
    for text in ask(llm, StructuredOutput(grammar=arithmetic), n=4, max_tokens=200):
        assert re.fullmatch(r"[0-9(][-+*/0-9()]*=[0-9]{1,3}", text) or len(text) > 60, text
    assert set(ask(llm, StructuredOutput(grammar='root ::= "yes" | "no"'), n=4)) <= {"yes", "no"}
    for wrong in ("root ::= (", 'root ::= "a" nowhere', 'start ::= "a"'):
        with pytest.raises(RequestError, match="constraint is not valid"):
            ask(llm, StructuredOutput(grammar=wrong))
    assert ask(llm, StructuredOutput(choice=["x"])) == ["x"], "and the next request is answered"


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


def test_an_equal_constraint_is_compiled_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, compiled = llm.engine.frontend.grammars, []
    load = compiler._load_tables
    monkeypatch.setattr(compiler, "_load_tables", lambda: compiled.append(1) or load())
    wanted = StructuredOutput(choice=["compiled", "only once"])
    first = ask(llm, wanted, n=3)
    assert ask(llm, StructuredOutput(choice=["compiled", "only once"]), n=3) == first
    assert len(compiled) == 1
    assert set(first) <= {"compiled", "only once"}


def test_constraints_are_forgotten_in_the_order_of_their_use(llm: LLM) -> None:
    compiler = llm.engine.frontend.grammars
    for index in range(2 * grammar.MAX_KEPT):
        compiler.compile(StructuredOutput(regex=f"x{index}"))
        compiler.compile(StructuredOutput(regex="kept"))
    sources = list(compiler._known)
    assert len(sources) == grammar.MAX_KEPT
    assert "kept" in sources[-1]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (StructuredOutput(json={"properties": {f"p{i}": {} for i in range(1001)}}), "1001 properties"),
        (
            StructuredOutput(json={"items": {"properties": {f"p{i}": {} for i in range(1001)}}}),
            "1001 properties",
        ),
        (StructuredOutput(json={"enum": ["x" * 200_000]}), "at most 200000"),
        (StructuredOutput(regex="x" * 200_001), "200001 characters"),
        (StructuredOutput(choice=["x" * 200_000]), "at most 200000"),
        (StructuredOutput(grammar="x" * 200_001), "200001 characters"),
    ],
)
def test_large_constraints_are_refused_before_they_cost(
    llm: LLM, wanted: StructuredOutput, says: str
) -> None:
    with pytest.raises(RequestError, match=f"too large: .*{says}"):
        ask(llm, wanted)
