"""Drafts must not show in what a request gives: token for token, over every family."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from opsin import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from opsin.errors import ConfigError
from opsin.results import RequestOutput
from tests.models.families import FAMILIES
from tests.models.golden import picture
from tests.models.speculation import NGRAM, Answers, answers_of, drafts_from, eager_drafts
from tests.models.test_invariance import PICTURES, _bytes_per_token, load, requests

COUNT = 16
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "shape": {"enum": ["a", "b"]}},
    "required": ["count", "shape"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def generate(llm: LLM, family: str) -> list[RequestOutput]:
    batch = requests(family, COUNT)
    return llm.generate([prompt for prompt, _ in batch], [params for _, params in batch], use_tqdm=False)


@pytest.fixture(scope="module")
def expected(family: str) -> Answers:
    """One token per step, one by one."""
    with load(family, enable_prefix_caching=False) as plain:
        return answers_of(
            plain.generate(prompt, params, use_tqdm=False)[0] for prompt, params in requests(family, COUNT)
        )


@pytest.fixture(scope="module")
def llm(family: str) -> Iterator[LLM]:
    with load(family, speculative_config=NGRAM) as loaded:
        yield loaded


def check_counts(llm: LLM) -> None:
    stats = llm.engine.stats()
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens
    assert sum(stats.spec_decode_num_accepted_tokens_per_pos) == stats.spec_decode_num_accepted_tokens
    assert stats.kv_blocks_used == 0


def test_right_and_wrong_drafts_change_nothing(llm: LLM, family: str, expected: Answers) -> None:
    with drafts_from(expected):
        assert answers_of(generate(llm, family)) == expected
        assert answers_of(generate(llm, family)) == expected, "from the prefix cache"
    check_counts(llm)


def test_drafts_from_the_text_change_nothing(llm: LLM, family: str, expected: Answers) -> None:
    before = llm.engine.stats().spec_decode_num_drafts
    with eager_drafts():
        assert answers_of(generate(llm, family)) == expected
    assert llm.engine.stats().spec_decode_num_drafts > before


@pytest.mark.parametrize("chunk", [7, 29])
def test_in_chunks(family: str, expected: Answers, chunk: int) -> None:
    with (
        load(family, max_num_batched_tokens=chunk, speculative_config=NGRAM) as chunked,
        drafts_from(expected),
    ):
        assert answers_of(generate(chunked, family)) == expected
        check_counts(chunked)


def test_with_preemption(family: str) -> None:
    params = SamplingParams(temperature=1.0, seed=8, n=4, max_tokens=48, ignore_eos=True)
    texts = [prompt for prompt, _ in requests(family, COUNT) if "multi_modal_data" not in prompt]
    with load(family) as roomy:
        outputs = roomy.generate(texts, params, use_tqdm=False)
        per_block = roomy.engine.resolved.block_size * _bytes_per_token(roomy)
    expected = answers_of(outputs)
    longest = max(len(prompt) + len(answer) for (prompt, _), answer in expected.items())
    settings = {"kv_cache_memory": (longest // 16 + 4) * per_block, "max_model_len": longest + 1}
    with load(family, speculative_config=NGRAM, **settings) as tight, drafts_from(expected):
        assert answers_of(tight.generate(texts, params, use_tqdm=False)) == expected
        assert tight.engine.stats().num_preemptions > 0, "this load was meant to be too much"
        check_counts(tight)


@pytest.mark.parametrize(
    "wishes",
    [
        {"temperature": 1.0, "top_p": 0.9, "seed": 7, "n": 2},
        {"temperature": 0.8, "top_k": 20, "min_p": 0.01, "seed": 3, "logprobs": 3, "prompt_logprobs": 1},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
        {"temperature": 0, "min_tokens": 8, "ignore_eos": False, "logit_bias": {5: 3.0, 9: -50.0}},
        {"temperature": 0, "bad_words": ["the", "a cat"], "allowed_token_ids": list(range(3, 200))},
        {"temperature": 0, "logits_processors": [lambda output_ids, row: row.roll(len(output_ids) % 3)]},
        {"temperature": 1.2, "seed": 1, "stop": ["e", "a"], "min_tokens": 3, "ignore_eos": False},
        {"temperature": 1.2, "seed": 2, "stop": ["o"], "include_stop_str_in_output": True},
    ],
    ids=lambda wishes: "-".join(wishes),
)
def test_whatever_is_asked(llm: LLM, family: str, wishes: dict[str, Any]) -> None:
    params = SamplingParams(**{"ignore_eos": True, "max_tokens": 24, **wishes})
    prompts = [prompt for prompt, _ in requests(family, 4)]
    with load(family) as plain:
        wanted = plain.generate(prompts, params, use_tqdm=False)
    free = plain_answers(family, prompts, params)
    with drafts_from(free):
        found = llm.generate(prompts, params, use_tqdm=False)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
        for one, other in zip(mine.outputs, theirs.outputs, strict=True):
            assert one.token_ids == other.token_ids
            assert (one.text, one.finish_reason, one.stop_reason) == (
                other.text,
                other.finish_reason,
                other.stop_reason,
            )
            for entry, reference, token in zip(one.logprobs or [], other.logprobs or [], one.token_ids):
                assert entry[token].logprob == pytest.approx(reference[token].logprob, abs=1e-3)


def plain_answers(family: str, prompts: list[Any], params: SamplingParams) -> Answers:
    """The same answers beyond where stop strings end them, so that drafts reach past the end."""
    longer = params.clone()
    longer.stop, longer.ignore_eos, longer.max_tokens = None, True, (params.max_tokens or 0) + 8
    with load(family) as plain:
        return answers_of(plain.generate(prompts, longer, use_tqdm=False))


def test_the_grammar_is_followed(llm: LLM, family: str) -> None:
    params = SamplingParams(
        temperature=0.9, seed=4, max_tokens=60, structured=StructuredOutputsParams(json=SCHEMA)
    )
    prompts = [prompt for prompt, _ in requests(family, 4)]
    with load(family) as plain:
        wanted = plain.generate(prompts, params, use_tqdm=False)
    accepted = llm.engine.stats().spec_decode_num_accepted_tokens
    with drafts_from(answers_of(wanted), skill=0.9):
        found = llm.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in wanted]
    assert all(set(json.loads(output.outputs[0].text)) == {"count", "shape"} for output in found)
    assert llm.engine.stats().spec_decode_num_accepted_tokens > accepted


def test_beams_and_the_last_token_are_not_guessed(llm: LLM, family: str) -> None:
    data = {
        "prompt": f"{FAMILIES[family].image_text(1)} and and and and?",
        "multi_modal_data": {"image": picture(PICTURES[0])},
    }
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    with load(family) as plain:
        [wanted] = plain.beam_search([data], params)
    before = llm.engine.stats().spec_decode_num_drafts
    with eager_drafts():
        [found] = llm.beam_search([data], params)
        llm.generate(data, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    assert [beam.tokens for beam in found.sequences] == [beam.tokens for beam in wanted.sequences]
    assert llm.engine.stats().spec_decode_num_drafts == before


def test_embeddings_are_as_ever(llm: LLM, family: str) -> None:
    if "embed" not in llm.engine.model_spec.tasks:
        with pytest.raises(ConfigError, match="task='embed'"):
            load(family, task="embed", speculative_config=NGRAM)
        return
    prompts = [prompt for prompt, _ in requests(family, 4)]
    found = []
    for settings in ({}, {"speculative_config": NGRAM}):
        with load(family, task="embed", **settings) as embedding, eager_drafts():
            found.append([output.outputs.embedding for output in embedding.embed(prompts, use_tqdm=False)])
            assert embedding.engine.stats().spec_decode_num_drafts == 0
    assert found[0] == found[1]


def test_answers_end_at_the_context(family: str, expected: Answers) -> None:
    (prompt, _), answer = min(expected.items(), key=lambda entry: len(entry[0][0]))
    context = len(prompt) + len(answer) - 1
    with load(family, max_model_len=context, speculative_config=NGRAM) as short, drafts_from(expected, 1.0):
        [output] = short.generate(
            {"prompt_token_ids": list(prompt)},  # the shortest one is text
            SamplingParams(temperature=0, max_tokens=None, ignore_eos=True),
            use_tqdm=False,
        )
    assert output.outputs[0].token_ids == list(answer[:-1])
    assert output.outputs[0].finish_reason == "length"
