"""Guesses against a slow search of the whole text, kept tokens against single steps, and what it may cost."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opsin import EngineArgs
from opsin.api import MappedMedia, PlacedMedia, ProcessedPrompt
from opsin.config import SpeculativeConfig
from opsin.engine import sequence as engine_sequence
from opsin.engine import speculation
from opsin.engine.sampler import make_generator, sample
from opsin.engine.sequence import SampledToken
from opsin.engine.speculation import (
    HOLE,
    MAX_CANDIDATES,
    MOST_REST,
    ROWS_PER_STEP_COST,
    Drafter,
    NgramIndex,
    _Trust,
    sample_runs,
)
from opsin.errors import ConfigError, RequestError
from opsin.kernels import top_k
from opsin.params import SamplingParams

VOCAB = 12


def make_sequence(
    params: SamplingParams,
    prompt: Sequence[int] = (1, 2),
    seed: int = 0,
    eos: frozenset[int] = frozenset({0}),
    bad_words: Sequence[Sequence[int]] = (),
    media: Sequence[PlacedMedia] = (),
) -> engine_sequence.Sequence:
    return engine_sequence.Sequence(
        seq_id=seed,
        request_id=str(seed),
        index=0,
        prompt=ProcessedPrompt(token_ids=prompt, media=media),
        params=params,
        eos_token_ids=eos,
        bad_words=bad_words,
        generator=None if params.greedy else make_generator(seed),
    )


# ---- Guessing ------------------------------------------------------------------------------------


def slow_guess(text: list[int], shortest: int, longest: int, count: int) -> list[int]:
    """All earlier places are looked at, token by token."""
    tail = text[-shortest:]
    places = [
        end for end in range(shortest, len(text)) if text[end - shortest : end] == tail and HOLE not in tail
    ]
    best = None
    for end in places[::-1][:MAX_CANDIDATES]:
        size = shortest
        while size < min(longest, end) and text[end - size - 1 : end] == text[len(text) - size - 1 :]:
            if HOLE in text[end - size - 1 : end]:
                break
            size += 1
        if best is None or size > best[0]:
            best = size, end
    if best is None or len(tail) < shortest:
        return []
    longer = list(text)
    for place in range(best[1], best[1] + count):
        if longer[place] == HOLE:
            break
        longer.append(longer[place])
    return longer[len(text) :]


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.lists(st.sampled_from([HOLE, 1, 1, 2, 3]), max_size=20), max_size=8),
    shortest=st.integers(1, 3),
    more=st.integers(0, 3),
    count=st.integers(1, 12),
)
def test_a_guess_is_what_followed_the_longest_match(
    pieces: list[list[int]], shortest: int, more: int, count: int
) -> None:
    index, text = NgramIndex(shortest, shortest + more), []
    for piece in pieces:
        index.extend(piece)
        text += piece
        assert index.guess(count) == slow_guess(text, shortest, shortest + more, count)


def test_a_long_text_of_one_token_is_looked_up_in_few_places() -> None:
    class Counting(list[int]):
        reads = 0

        def __getitem__(self, place: Any) -> Any:
            self.reads += 1
            return super().__getitem__(place)

    index = NgramIndex(2, 5000)
    index._text = Counting()
    index.extend([7] * 100_000)
    index._text.reads = 0  # type: ignore[attr-defined]
    assert index.guess(8) == [7] * 8
    assert index._text.reads < 2 * 5000 * MAX_CANDIDATES + 50  # type: ignore[attr-defined]


def drafter(num: int = 8, max_len: int = 1000, **more: Any) -> Drafter:
    return Drafter(SpeculativeConfig(num_speculative_tokens=num, **more), max_len)


@pytest.fixture
def hopeful() -> Iterator[None]:
    """Drafts begin long."""
    with patch.object(speculation, "FIRST_CHANCE", 0.95):
        yield


PROMPT = [5, 6, 7, 8, 9, 10, 5, 6]


@pytest.mark.usefixtures("hopeful")
@pytest.mark.parametrize(
    ("params", "max_len", "room", "expected"),
    [
        ({}, 1000, 99, [7, 8, 9]),
        ({}, 1000, 2, [7, 8]),
        ({}, 1000, -3, []),
        ({}, 10, 99, [7]),
        ({}, 9, 99, []),
        ({"max_tokens": 3}, 1000, 99, [7, 8]),
        ({"max_tokens": 1}, 1000, 99, []),
        ({"stop_token_ids": [8]}, 1000, 99, [7]),
        ({"stop_token_ids": [7]}, 1000, 99, []),
    ],
)
def test_a_draft_ends_before_the_answer_must(
    params: dict[str, Any], max_len: int, room: int, expected: list[int]
) -> None:
    sequence = make_sequence(SamplingParams(**{"temperature": 0, "max_tokens": None, **params}), PROMPT)
    assert list(drafter(3, max_len).draft(sequence, 1, room)) == expected


@pytest.mark.usefixtures("hopeful")
def test_a_draft_ends_before_the_model_would() -> None:
    for ignore_eos, expected in ((False, (7,)), (True, (7, 8, 9))):
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=ignore_eos)
        assert drafter(3).draft(make_sequence(params, PROMPT, eos=frozenset({8})), 1, 99) == expected


@pytest.mark.usefixtures("hopeful")
def test_a_picture_is_neither_matched_nor_guessed() -> None:
    def item(start: int) -> PlacedMedia:
        return PlacedMedia(
            modality="image", key="k", mapped=MappedMedia(num_embeds=3), start=start, is_embed=[True] * 3
        )

    params = SamplingParams(temperature=0, max_tokens=None)
    after_picture = [3, 3, 3, 8, 4, 3, 3, 3]
    assert drafter().draft(make_sequence(params, after_picture), 1, 99)
    assert drafter().draft(make_sequence(params, after_picture, media=[item(0), item(5)]), 1, 99) == ()
    before_picture = [5, 6, 7, 3, 3, 3, 5, 6]
    assert drafter().draft(make_sequence(params, before_picture, media=[item(3)]), 1, 99) == (7,)


@pytest.mark.usefixtures("hopeful")
def test_many_sequences_guess_less() -> None:
    lengths = []
    for num_rows in (1, 4, 8, 64, 1000):
        sequence = make_sequence(SamplingParams(temperature=0, max_tokens=None), PROMPT)
        lengths.append(len(drafter().draft(sequence, num_rows, 99)))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 8
    assert lengths[-2:] == [0, 0]


# ---- What wrong guesses may cost ------------------------------------------------------------------


def slowdown(outcome: Callable[[int], int], num_steps: int, num_rows: int, limit: int) -> tuple[float, int]:
    """Steps' worth of computing that drafts cost more than they saved (by decision 86), and tokens.

    Args:
        outcome: length of a draft -> how many of its tokens are right.
        num_steps: steps in which something could be guessed.
        num_rows: sequences in the step.
        limit: ``num_speculative_tokens``.
    """
    trust, lost, num_tokens = _Trust(), 0.0, num_steps
    cost = num_rows / (num_rows + ROWS_PER_STEP_COST)
    for _ in range(num_steps):
        length = min(limit, trust.length(cost))
        if length:
            right = outcome(length)
            trust.learn(right, wrong=right < length)
            lost += length * cost - right
            num_tokens += right
    return lost, num_tokens


@pytest.mark.parametrize("num_rows", [1, 4, 16, 64])
def test_hopeless_guesses_cost_few_steps_and_then_nearly_nothing(num_rows: int) -> None:
    cost = num_rows / (num_rows + ROWS_PER_STEP_COST)
    lost, num_tokens = slowdown(lambda length: 0, 10_000, num_rows, 64)
    assert num_tokens == 10_000
    assert lost <= 4 + num_tokens / MOST_REST * cost


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    chance=st.floats(0, 1),
    num_rows=st.integers(1, 64),
    limit=st.integers(1, 32),
)
def test_no_luck_makes_it_much_slower(seed: int, chance: float, num_rows: int, limit: int) -> None:
    """Whatever the chance of a right guess."""
    luck = random.Random(seed)

    def outcome(length: int) -> int:
        return next((i for i in range(length) if luck.random() > chance), length)

    lost, num_tokens = slowdown(outcome, 400, num_rows, limit)
    assert lost <= 4 + 0.1 * num_tokens


@pytest.mark.parametrize("num_rows", [1, 4, 16, 64])
def test_no_plot_makes_it_much_slower(num_rows: int) -> None:
    """Every pattern of right and wrong guesses that repeats."""
    for pattern in (p for n in range(1, 6) for p in itertools.product((0, 1, 2, 16), repeat=n)):
        plan = itertools.cycle(pattern)

        def outcome(length: int, plan: Iterator[int] = plan) -> int:
            return min(length, next(plan))

        lost, num_tokens = slowdown(outcome, 200, num_rows, 16)
        assert lost <= 4 + 0.1 * num_tokens, pattern


def test_right_guesses_are_trusted_again() -> None:
    trust = _Trust()
    for _ in range(500):
        if trust.length(0.1):
            trust.learn(0, wrong=True)
    waited = next(step for step in itertools.count() if trust.length(0.1))
    assert waited <= MOST_REST
    for _ in range(10):
        trust.learn(trust.length(0.1) or 1, wrong=False)
    assert trust.length(0.1) >= 8


# ---- Verifying -----------------------------------------------------------------------------------


def logits_after(token_ids: Sequence[int], seed: int) -> Tensor:
    """A language model of three tokens' memory, with ties and certainties now and then."""
    key = hash((*token_ids[-3:], seed)) % 2**31
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(key)) * (0.3, 2, 8)[key % 3]
    return row.round() if key % 5 == 0 else row


def logits_of_run(sequence: engine_sequence.Sequence, draft: Sequence[int], seed: int) -> list[Tensor]:
    texts = [[*sequence.token_ids, *draft[:i]] for i in range(len(draft) + 1)]
    return [logits_after(text, seed) for text in texts]


def noticing(output_ids: list[int], row: Tensor) -> Tensor:
    return row + 0.25 * len(output_ids) * (torch.arange(VOCAB) % 3 == 0)


PARAMS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.0, 0.7, 1.3])},
    optional={
        "top_k": st.integers(1, 5),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.just(0.05),
        "repetition_penalty": st.just(1.3),
        "frequency_penalty": st.just(0.6),
        "presence_penalty": st.just(-0.4),
        "min_tokens": st.integers(1, 9),
        "logit_bias": st.just({3: 2.5, 4: -100.0}),
        "allowed_token_ids": st.just([0, 1, 2, 3, 4, 5, 6, 7]),
        "logprobs": st.integers(0, 3),
        "logits_processors": st.just([noticing]),
    },
)


@settings(max_examples=300, deadline=None)
@given(
    wishes=st.lists(st.tuples(PARAMS, st.booleans()), min_size=1, max_size=4),
    seed=st.integers(0, 2**20),
    skill=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_drafts_change_no_token_whatever_is_asked(
    wishes: list[tuple[dict[str, Any], bool]], seed: int, skill: float
) -> None:
    """Random ones included: each row uses the generator that it would have used."""
    count = 24
    chance = random.Random(seed)

    def start() -> list[engine_sequence.Sequence]:
        return [
            make_sequence(
                SamplingParams(**wish, max_tokens=100),
                prompt=[(seed + i) % VOCAB, 3, 4],
                seed=seed + i,
                bad_words=[[3, 5], [6]] if words else (),
            )
            for i, (wish, words) in enumerate(wishes)
        ]

    plain = start()
    wanted: list[list[SampledToken]] = []
    for sequence in plain:
        wanted.append([])
        while len(wanted[-1]) < count:
            [token] = sample(logits_after(sequence.token_ids, seed)[None], [sequence])
            assert isinstance(token, SampledToken)
            wanted[-1].append(token)
            sequence.token_ids.append(token.token_id)

    found: list[list[SampledToken]] = [[] for _ in plain]
    sequences = start()
    while any(len(run) < count for run in found):
        drafts = []
        for run, right in zip(found, wanted):
            coming = [token.token_id for token in right[len(run) : len(run) + chance.randint(0, 5)]]
            drafts.append(tuple(t if chance.random() < skill else chance.randrange(VOCAB) for t in coming))
        rows = [row for s, d in zip(sequences, drafts) for row in logits_of_run(s, d, seed)]
        before = [list(s.token_ids) for s in sequences]
        runs = sample_runs(torch.stack(rows), sequences, drafts, top_k)
        assert [s.token_ids for s in sequences] == before, "the scheduler appends them"
        for sequence, draft, run, all_of_it in zip(sequences, drafts, runs, found):
            assert isinstance(run, list)
            assert 1 <= len(run) <= len(draft) + 1
            all_of_it += run
            sequence.token_ids += [token.token_id for token in run]
    for right, run in zip(wanted, found):
        assert [token.token_id for token in run[:count]] == [token.token_id for token in right]
        for one, other in zip(run, right):
            assert one.rank == other.rank
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert sorted(dict(one.top)) == sorted(dict(other.top)) or one.rank is not None


@pytest.mark.parametrize("draft", [(2, 5), (3, 3), (0, 2)])
@pytest.mark.parametrize("settings_", [{}, {"top_k": 4}, {"top_p": 0.8}, {"temperature": 1.7}])
def test_samples_have_the_distribution_they_have_without_drafts(
    draft: tuple[int, int], settings_: dict[str, Any]
) -> None:
    """Chi-square of the first three tokens, against the probabilities worked out from the logits.

    Steps go on until three tokens are there; a wrong draft makes that several steps.
    """
    vocab, count = 6, 20_000
    params = SamplingParams(**{"temperature": 1.0, "max_tokens": 9, **settings_})
    table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(3))

    def probabilities(last: int) -> list[float]:
        row = (table[last].double() / params.temperature).softmax(-1)
        order = row.argsort(descending=True)
        kept = order[: params.top_k or vocab]
        before = row[order].cumsum(0) - row[order]
        kept = kept[(before < params.top_p)[: len(kept)]]
        cut = torch.zeros_like(row).index_copy(0, kept, row[kept])
        return (cut / cut.sum()).tolist()  # type: ignore[no-any-return]

    sequences = [make_sequence(params, prompt=[1], seed=1000 + i) for i in range(count)]
    going = sequences
    while going:
        drafts = [draft[: 3 - s.num_output] if s.num_output == 0 else draft[:1] for s in going]
        texts = [[*s.token_ids, *d[:i]] for s, d in zip(going, drafts) for i in range(len(d) + 1)]
        logits = table[[text[-1] for text in texts]]
        for sequence, run in zip(going, sample_runs(logits, going, drafts, top_k)):
            assert isinstance(run, list)
            sequence.token_ids += [token.token_id for token in run]
        going = [s for s in sequences if s.num_output < 3]
    seen = Counter(tuple(s.output_ids[:3]) for s in sequences)
    statistic, cells, rest_seen, rest_expected = 0.0, 0, 0.0, 0.0
    for triple in itertools.product(range(vocab), repeat=3):
        chances = [probabilities(last)[token] for last, token in zip((1, *triple), triple)]
        expected = count * math.prod(chances)
        if expected == 0:
            assert seen[triple] == 0, "a token that the settings rule out"
        elif expected < 5:
            rest_seen, rest_expected = rest_seen + seen[triple], rest_expected + expected
        else:
            statistic, cells = statistic + (seen[triple] - expected) ** 2 / expected, cells + 1
    if rest_expected >= 5:
        statistic, cells = statistic + (rest_seen - rest_expected) ** 2 / rest_expected, cells + 1
    freedom = cells - 1
    # Wilson and Hilferty (1931): the 99.99% point of chi-square.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_an_error_behind_the_draft_leaves_the_tokens_before_it() -> None:
    broken = torch.full((VOCAB,), math.nan)
    good = torch.eye(VOCAB)[[4, 5]] * 9
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=0.01)):
        run, first, wrong = sample_runs(
            torch.stack([good[0], good[1], broken, broken, good[0], broken]),
            [make_sequence(params, seed=i) for i in range(3)],
            [(4, 5), (), (1,)],
            top_k,
        )
        assert isinstance(run, list)
        assert [token.token_id for token in run] == [4, 5]
        assert isinstance(first, RequestError)
        assert isinstance(wrong, list)
        assert [token.token_id for token in wrong] == [4], "the row behind a wrong guess is nobody's"


def test_a_step_that_fails_is_sampled_again_as_if_for_the_first_time() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=1.0)
    wanted = sample_runs(torch.eye(VOCAB)[[4, 5]] * 9, [make_sequence(params)], [(4,)], top_k)
    calls = itertools.count()

    def failing(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if next(calls) == 1:
            raise RuntimeError("no")
        return top_k(x, k)

    sequence = make_sequence(params)
    with pytest.raises(RuntimeError):
        sample_runs(torch.eye(VOCAB)[[4, 5]] * 9, [sequence], [(4,)], failing)
    assert sequence.output_ids == []
    again = sample_runs(torch.eye(VOCAB)[[4, 5]] * 9, [sequence], [(4,)], top_k)
    assert again == wanted
    assert sequence.sampler_state.counts.num_counted == 1


# ---- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "ngram", "num_speculative_tokens": 5}, (5, 2, 4)),
        ({"model": "[ngram]", "num_speculative_tokens": 5}, (5, 2, 4)),
        ({"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 1}, (5, 1, 1)),
        ({"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 6}, (5, 6, 6)),
        (
            {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 3, "prompt_lookup_max": 7},
            (5, 3, 7),
        ),
    ],
)
def test_vllms_names(given: dict[str, Any], expected: tuple[int, int, int]) -> None:
    made = EngineArgs(model="m", speculative_config=given).speculative
    assert made is not None
    assert (made.num_speculative_tokens, made.shortest_match, made.longest_match) == expected


@pytest.mark.parametrize("nothing", [None, {}])
def test_off_by_default(nothing: Any) -> None:
    assert EngineArgs(model="m", speculative_config=nothing).speculative is None
    assert EngineArgs(model="m").speculative is None


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"method": "eagle", "num_speculative_tokens": 5},
            "speculative_config: method='eagle': expected 'ngram'",
        ),
        ({"num_speculative_tokens": 5}, "method is missing"),
        ({"method": "ngram"}, "num_speculative_tokens is missing"),
        (
            {"method": "ngram", "num_speculative_tokens": 0},
            "num_speculative_tokens=0: expected an integer, at",
        ),
        ({"method": "ngram", "num_speculative_tokens": True}, "num_speculative_tokens=True"),
        ({"method": "ngram", "num_speculative_tokens": 2, "lookup": 3}, "unknown 'lookup'"),
        ({"method": "ngram", "num_speculative_tokens": 2, "num_lookahead": 3}, "unknown 'num_lookahead'"),
        ({"model": "a/draft", "num_speculative_tokens": 2}, "model='a/draft' is not supported"),
        (
            {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 5, "prompt_lookup_max": 3},
            "prompt_lookup_min=5 is greater than prompt_lookup_max=3",
        ),
        ("ngram", "speculative_config='ngram': expected a mapping"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        EngineArgs(model="m", speculative_config=given)
