"""Drafts on the simulated card: a decode of several rows, and no other tokens."""

from __future__ import annotations

import pytest

from opsin import LLM, SamplingParams
from tests.models.golden import GOLDEN
from tests.models.speculation import NGRAM, Answers, answers_of, drafts_from
from tests.models.test_invariance import requests

COUNT = 6


def load(family: str, device: str, **settings: object) -> LLM:
    return LLM(
        str(GOLDEN / family / "model"), device=device, dtype="float32", kv_cache_memory=2**24, **settings
    )


def generate(llm: LLM, family: str, params: SamplingParams | None) -> Answers:
    batch = requests(family, COUNT)
    return answers_of(
        llm.generate([prompt for prompt, _ in batch], params or [own for _, own in batch], use_tqdm=False)
    )


@pytest.mark.parametrize("family", ["llava15", "minicpmv26", "phi3v", "qwen2vl"])
def test_drafts_change_nothing(family: str) -> None:
    random = SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True, logprobs=1)
    with load(family, "cpu") as plain:
        expected = [generate(plain, family, params) for params in (None, random)]
    with load(family, "mlu", speculative_config=NGRAM, max_num_batched_tokens=64) as llm:
        for params, answers in zip((None, random), expected):
            with drafts_from(answers):
                assert generate(llm, family, params) == answers
        stats = llm.engine.stats()
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens
    assert stats.kv_blocks_used == 0
