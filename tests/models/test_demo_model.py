"""The embedded models answer truthfully, so what they say shows whether pictures are mixed up anywhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from opsin import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

from models import MODELS
from run import conversation
from scenes import HELD_OUT_SEEDS, SMALL_TALK, make_question

if TYPE_CHECKING:
    from models import DemoModel
    from scenes import Question

SEED = HELD_OUT_SEEDS[0]
GREEDY = SamplingParams(temperature=0, max_tokens=32)
Chat = list[dict[str, Any]]


@pytest.fixture(scope="module", params=list(MODELS))
def demo(request: pytest.FixtureRequest) -> DemoModel:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def llm(demo: DemoModel) -> Iterator[LLM]:
    with LLM(demo.id, kv_cache_memory=2**26) as loaded:
        yield loaded


def ask(llm: LLM, chats: Sequence[Chat]) -> list[str]:
    outputs = llm.chat(list(chats), GREEDY, use_tqdm=False)
    return [output.outputs[0].text.strip() for output in outputs]


def answers(llm: LLM, questions: Sequence[Question]) -> list[str]:
    return ask(llm, [conversation(question) for question in questions])


def answered_kinds(demo: DemoModel) -> list[str]:
    """What it is tested on to the word: descriptions are long, and wrong if one word is."""
    return [kind for kind in demo.kinds if not kind.startswith("describe")]


def test_it_sees(demo: DemoModel, llm: LLM) -> None:
    kinds = demo.kinds
    questions = [demo.question(kind, SEED + 900_000 + i)[1] for kind in kinds for i in range(24)]
    right = Counter(
        question.kind
        for answer, question in zip(answers(llm, questions), questions, strict=True)
        if answer == question.answer
    )
    assert {kind: right[kind] for kind in kinds if right[kind] < 20} == {}, (
        "demo/evaluate.py measures it properly"
    )


def test_a_mixed_batch_is_answered_truly_and_every_picture_encoded_once(demo: DemoModel, llm: LLM) -> None:
    """24 requests: one picture or several, a film, text alone, and pictures that come again."""
    kinds = answered_kinds(demo)
    questions = [demo.question(kinds[i % len(kinds)], SEED + 800_000 + i)[1] for i in range(14)]
    chats = [(conversation(question), question.answer) for question in questions]
    chats += chats[:6]  # the same again, in the same batch
    chats += [([{"role": "user", "content": text}], SMALL_TALK[text]) for text in list(SMALL_TALK)[2:6]]
    assert len(chats) == 24
    chats = chats[::2] + chats[1::2]
    before = llm.engine.stats().num_encoded
    assert ask(llm, [chat for chat, _ in chats]) == [truth for _, truth in chats]
    shown = {picture.tobytes() for q in questions for picture in q.images}
    films = sum(bool(question.frames) for question in questions)
    assert llm.engine.stats().num_encoded - before == len(shown) + films


def test_a_batch_answers_what_each_question_alone_does(demo: DemoModel, llm: LLM) -> None:
    kinds = answered_kinds(demo)
    questions = [demo.question(kind, SEED + 600_000 + i)[1] for i in range(3) for kind in kinds]
    alone = [answers(llm, [question])[0] for question in questions]
    before = llm.engine.stats().num_encoded
    twice = [question for question in questions for _ in range(2)]
    assert answers(llm, twice) == [answer for answer in alone for _ in range(2)]
    assert llm.engine.stats().num_encoded == before, "known pictures are not encoded again"


def test_swapped_pictures_swap_the_answer(demo: DemoModel, llm: LLM) -> None:
    """Of two pictures that are asked about one after another, or compared where the model compares."""
    if "compare" not in demo.kinds:
        questions = [demo.question("colour", SEED + 700_000 + i)[1] for i in range(40)]
        asked: dict[str, list[Question]] = {}
        for question in questions:
            asked.setdefault(question.text, []).append(question)
        pairs = [two[:2] for two in asked.values() if len(two) > 1 and two[0].answer != two[1].answer]
        assert len(pairs) >= 3
        for first, second in pairs:
            assert answers(llm, [first, second]) == answers(llm, [second, first])[::-1]
            assert answers(llm, [first]) != answers(llm, [second])
        return
    other = {"the first": "the second", "the second": "the first", "the same": "the same"}
    seen: Counter[str] = Counter()
    consistent = 0
    for seed in range(100):
        question = make_question("compare", SEED + 700_000 + seed, (112, 112))
        if question.answer not in other:
            continue
        turned = conversation(question)
        turned[0]["content"][:2] = turned[0]["content"][1::-1]
        straight, swapped = ask(llm, [conversation(question), turned])
        seen[straight] += 1
        consistent += swapped == other.get(straight)
    assert len(seen) >= 2
    assert consistent >= 0.9 * seen.total()


def test_slices_are_seen() -> None:
    """MiniCPM-V asked to slice: an overview and slices, which only fit together in their right order."""
    model = MODELS["minicpmv"]
    questions = [
        make_question(kind, SEED + 500_000 + i, (168, 168)) for kind in ("colour", "shape") for i in range(20)
    ]
    with LLM(model.id, kv_cache_memory=2**26, mm_processor_kwargs={"max_slice_nums": 4}) as llm:
        outputs = llm.chat([conversation(question) for question in questions], GREEDY, use_tqdm=False)
    assert all(len(output.prompt_token_ids) > 5 * 64 for output in outputs), "an overview and four slices"
    right = sum(o.outputs[0].text == q.answer for o, q in zip(outputs, questions, strict=True))
    assert right >= 36
