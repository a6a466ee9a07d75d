"""The embedded model answers truthfully, so what it says shows whether pictures are mixed up anywhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from opsin import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

from run import conversation
from scenes import HELD_OUT_SEEDS, make_question

if TYPE_CHECKING:
    from scenes import Question

KINDS = ["colour", "shape", "position", "count", "number", "compare", "motion"]
GREEDY = SamplingParams(temperature=0, max_tokens=32)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("opsin/tiny-qwen2vl", kv_cache_memory=2**26) as loaded:
        yield loaded


def answers(llm: LLM, questions: list[Question]) -> list[str]:
    outputs = llm.chat([conversation(question) for question in questions], GREEDY, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize("kind", KINDS)
def test_it_sees(llm: LLM, kind: str) -> None:
    questions = [make_question(kind, HELD_OUT_SEEDS[0] + 900_000 + seed) for seed in range(40)]
    right = sum(answer == q.answer for answer, q in zip(answers(llm, questions), questions, strict=True))
    assert right >= 35, f"{right} of 40; demo/evaluate.py measures it properly"


def test_a_mixed_batch_never_mixes_pictures_up(llm: LLM) -> None:
    questions = [
        make_question(kind, HELD_OUT_SEEDS[0] + 800_000 + seed) for seed in range(3) for kind in KINDS
    ]
    alone = [answers(llm, [question])[0] for question in questions]
    before = llm.engine.stats().num_encoded
    twice = [question for question in questions for _ in range(2)]
    assert answers(llm, twice) == [answer for answer in alone for _ in range(2)]
    assert llm.engine.stats().num_encoded == before, "known pictures are not encoded again"


def test_swapped_pictures_swap_the_answer(llm: LLM) -> None:
    other = {"the first": "the second", "the second": "the first", "the same": "the same"}
    seen: Counter[str] = Counter()
    consistent = 0
    for seed in range(30):
        question = make_question("compare", HELD_OUT_SEEDS[0] + 700_000 + seed)
        if question.answer not in other or len(question.images) != 2:
            continue
        turned = conversation(question)
        parts = turned[0]["content"]
        places = [index for index, part in enumerate(parts) if part["type"] == "image_pil"]
        parts[places[0]], parts[places[1]] = parts[places[1]], parts[places[0]]
        straight = answers(llm, [question])[0]
        swapped = llm.chat(turned, GREEDY, use_tqdm=False)[0].outputs[0].text
        seen[straight] += 1
        consistent += swapped == other.get(straight)
    assert len(seen) >= 2
    assert consistent >= 0.9 * seen.total()
