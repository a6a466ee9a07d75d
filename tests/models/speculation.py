"""Drafts for tests: right ones from answers that are known, with wrong tokens among them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from opsin.engine import sequence as engine
from opsin.engine import speculation
from opsin.engine.speculation import Drafter
from opsin.results import RequestOutput

NGRAM = {"method": "ngram", "num_speculative_tokens": 6}

Answers = Mapping[tuple[tuple[int, ...], int], Sequence[int]]


def answers_of(outputs: Iterable[RequestOutput]) -> Answers:
    """(prompt, index of the sample) -> its tokens."""
    return {
        (tuple(output.prompt_token_ids), sample.index): sample.token_ids
        for output in outputs
        for sample in output.outputs
    }


@contextmanager
def eager_drafts() -> Iterator[None]:
    """Draft as much as is allowed, whether it pays or not."""
    with patch.object(speculation, "ROWS_PER_STEP_COST", 10**12):
        yield


@contextmanager
def drafts_from(answers: Answers, skill: float = 0.8) -> Iterator[None]:
    """Draft the known answers, with a wrong token here and there, as much as is allowed."""
    chance = random.Random(0)

    def guess(self: Drafter, sequence: engine.Sequence, count: int) -> list[int]:
        answer = answers[tuple(sequence.prompt.token_ids), sequence.index]
        coming = answer[sequence.num_output : sequence.num_output + count]
        return [token if chance.random() < skill else 5 + chance.randrange(40) for token in coming]

    with eager_drafts(), patch.object(Drafter, "guess", guess):
        yield
