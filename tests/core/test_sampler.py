"""The sampler against a slow and obvious one that sorts the whole vocabulary in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opsin.api import ProcessedPrompt
from opsin.engine import sampler
from opsin.engine.sampler import make_generator, prompt_logprobs, sample
from opsin.engine.sequence import SampledToken, Sequence
from opsin.errors import RequestError
from opsin.params import SamplingParams

GREEDY = SamplingParams(temperature=0)


def make_sequence(
    params: SamplingParams = GREEDY,
    *,
    seed: int = 0,
    prompt: tuple[int, ...] = (1, 2),
    output: tuple[int, ...] = (),
    eos: frozenset[int] = frozenset(),
) -> Sequence:
    return Sequence(
        seq_id=seed,
        request_id=str(seed),
        index=0,
        prompt=ProcessedPrompt(token_ids=prompt),
        params=params,
        eos_token_ids=eos,
        token_ids=[*prompt, *output],
        generator=None if params.greedy else make_generator(seed),
    )


def ids(results: list[SampledToken | RequestError]) -> list[int]:
    return [result.token_id for result in results if isinstance(result, SampledToken)]


def random_logits(rows: int, vocab: int, *, spread: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def oracle_adjust(row: Tensor, seq: Sequence) -> list[float]:
    """Bias, mask and penalties, token by token."""
    params, values = seq.params, row.double().tolist()
    for token, bias in (params.logit_bias or {}).items():
        values[token] += bias
    if seq.num_output < params.min_tokens:
        for token in {*seq.eos_token_ids, *(params.stop_token_ids or ())}:
            values[token] = -math.inf
    for token in range(len(values)):
        if token in seq.token_ids and params.repetition_penalty != 1:
            value = values[token]
            values[token] = (
                value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
            )
        times = seq.output_ids.count(token)
        values[token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    return values


def oracle_probabilities(row: Tensor, params: SamplingParams) -> np.ndarray:
    """Temperature, min_p, top_k, top_p as vLLM orders them, over the sorted vocabulary."""
    scaled = row.double() / params.temperature
    probabilities = scaled.softmax(-1)
    scaled[probabilities < params.min_p * probabilities.max()] = -math.inf
    order = scaled.argsort(descending=True, stable=True)
    if params.top_k:
        scaled[order[params.top_k :]] = -math.inf
    if params.top_p < 1:
        ordered = scaled.softmax(-1)[order]
        scaled[order[ordered.cumsum(-1) - ordered >= params.top_p]] = -math.inf
    return scaled.softmax(-1).numpy()


# --------------------------------------------------------------------------------------------------
# Greedy
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [7, 1024, 5003, 40_000])
def test_greedy_takes_the_first_of_the_largest(dtype: torch.dtype, vocab: int) -> None:
    logits = random_logits(9, vocab).to(dtype)
    logits[0, [vocab - 1, vocab // 2]] = 100.0
    expected = [row.float().tolist().index(row.float().max().item()) for row in logits]
    assert ids(sample(logits, [make_sequence() for _ in range(9)])) == expected


def test_only_candidate_is_greedy_and_needs_no_generator() -> None:
    logits = random_logits(2, 50)
    seq = make_sequence(SamplingParams(top_k=1, temperature=2.0))
    assert seq.generator is None
    assert ids(sample(logits, [seq, make_sequence()])) == logits.argmax(-1).tolist()


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(3, 300)
    before = logits.clone()
    everything = SamplingParams(
        logit_bias={3: 5.0}, min_tokens=2, repetition_penalty=1.3, presence_penalty=1.0, logprobs=3, top_p=0.7
    )
    sample(logits, [make_sequence(everything, output=(4,), eos=frozenset({0})) for _ in range(3)])
    sample(logits, [make_sequence(replace(everything, temperature=0.0)) for _ in range(3)])
    assert torch.equal(logits, before)


# --------------------------------------------------------------------------------------------------
# Bias, minimum length, penalties
# --------------------------------------------------------------------------------------------------

VOCAB = 12
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=8).map(tuple)


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    prompt=TOKENS.filter(bool),
    output=TOKENS,
    eos=st.frozensets(st.integers(0, VOCAB - 1), max_size=2),
    stops=st.lists(st.integers(0, VOCAB - 1), max_size=2),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-20, 20), max_size=3),
    min_tokens=st.integers(0, 10),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.1, 3),
)
def test_adjusted_greedy_is_the_oracles(
    seed: int,
    prompt: tuple[int, ...],
    output: tuple[int, ...],
    eos: frozenset[int],
    stops: list[int],
    bias: dict[int, float],
    min_tokens: int,
    presence: float,
    frequency: float,
    repetition: float,
) -> None:
    params = SamplingParams(
        temperature=0,
        max_tokens=None,
        logit_bias=bias,
        min_tokens=min_tokens,
        stop_token_ids=stops,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
    )
    logits = random_logits(1, VOCAB, seed=seed)
    seq = make_sequence(params, prompt=prompt, output=output, eos=eos)
    [token] = ids(sample(logits, [seq]))
    wanted = oracle_adjust(logits[0], seq)
    assert wanted[token] == pytest.approx(max(wanted), abs=1e-4)


def test_penalties_count_as_tokens_come_and_survive_preemption() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=0.7, repetition_penalty=1.2, max_tokens=None)
    growing = make_sequence(params, prompt=(3, 3, 5))
    for step in range(200):
        logits = random_logits(1, 90, spread=0.5, seed=step)
        fresh = make_sequence(params, prompt=(3, 3, 5), output=tuple(growing.output_ids))
        [token] = ids(sample(logits, [growing]))
        assert ids(sample(logits, [fresh])) == [token]
        growing.token_ids.append(token)
        if step == 50:
            growing.num_computed, growing.block_ids = 0, []  # what a preemption does
    assert len(set(growing.output_ids)) > 64, "more distinct tokens than the first arrays hold"


def test_ending_tokens_come_back_after_min_tokens() -> None:
    logits = torch.zeros(1, 6)
    logits[0, 4], logits[0, 5], logits[0, 2] = 9.0, 8.0, 7.0
    seq = make_sequence(
        SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[5, 77]), eos=frozenset({4})
    )
    taken = []
    for _ in range(3):
        taken += ids(sample(logits, [seq]))
        seq.token_ids.append(taken[-1])
    assert taken == [2, 2, 4]


# --------------------------------------------------------------------------------------------------
# Random rows
# --------------------------------------------------------------------------------------------------

CUTS = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=5.0),
    SamplingParams(top_k=3),
    SamplingParams(top_k=150),
    SamplingParams(top_k=100_000),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=0.97, temperature=1.5),
    SamplingParams(min_p=0.2),
    SamplingParams(min_p=0.01, temperature=2.0),
    SamplingParams(min_p=0.05, top_p=0.8),
    SamplingParams(top_k=20, top_p=0.8, temperature=0.7),
    SamplingParams(top_k=40, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("params", CUTS, ids=lambda p: f"{p.temperature}-{p.top_k}-{p.top_p}-{p.min_p}")
def test_frequencies_are_the_oracles(params: SamplingParams, spread: float) -> None:
    """200 tokens are more than the candidates, so flat rows take every way through the code."""
    draws = 3000
    row = random_logits(1, 200, spread=spread)
    expected = oracle_probabilities(row[0].clone(), params)
    drawn = ids(sample(row.expand(draws, -1), [make_sequence(params, seed=i) for i in range(draws)]))
    counts = np.bincount(drawn, minlength=200)
    assert counts.sum() == draws
    assert not counts[expected == 0].any(), "a token was drawn that the cuts exclude"
    # Standardised deviations; tokens too rare for the normal approximation are taken together.
    rare = expected * draws < 12
    seen = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum()) * draws
    deviation = (seen - wanted)[wanted > 0] / np.sqrt(wanted[wanted > 0])
    assert np.abs(deviation).max() < 5


def test_large_vocabulary_cuts_are_the_oracles() -> None:
    row = random_logits(1, 40_000, spread=4.0)
    for params in (SamplingParams(top_k=5), SamplingParams(top_p=0.6), SamplingParams(min_p=0.3)):
        allowed = set(np.flatnonzero(oracle_probabilities(row[0].clone(), params)).tolist())
        drawn = ids(sample(row.expand(400, -1), [make_sequence(params, seed=i) for i in range(400)]))
        assert set(drawn) <= allowed
        if len(allowed) <= 8:
            assert set(drawn) == allowed


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e6])
def test_extreme_temperatures(temperature: float) -> None:
    row = torch.full((1, 300), -200.0)
    row[0, 17], row[0, 18] = 300.0, 290.0
    seqs = [make_sequence(SamplingParams(temperature=temperature), seed=i) for i in range(300)]
    drawn = set(ids(sample(row.expand(300, -1), seqs)))
    assert drawn == {17} if temperature < 1 else len(drawn) > 100


def mixed_batch() -> tuple[Tensor, list[SamplingParams]]:
    params = [
        *CUTS,
        GREEDY,
        SamplingParams(temperature=0, logprobs=2),
        SamplingParams(logprobs=4, top_p=0.9),
        SamplingParams(temperature=0, repetition_penalty=1.5),
        SamplingParams(presence_penalty=0.5, logit_bias={7: 3.0}),
    ]
    return random_logits(len(params), 500, spread=1.0), params


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_row_depends_on_nothing_else_in_the_batch(data: st.DataObject) -> None:
    logits, params = mixed_batch()
    alone: dict[int, list[SampledToken | RequestError]] = {}
    for row, setting in enumerate(params):
        seq = make_sequence(setting, seed=row)
        alone[row] = [sample(logits[row : row + 1], [seq])[0] for _ in range(3)]
    seqs = {row: make_sequence(setting, seed=row) for row, setting in enumerate(params)}
    for step in range(3):
        order = data.draw(st.permutations(range(len(params))))
        for part in (order[: len(order) // 2], order[len(order) // 2 :]):
            got = sample(logits[part], [seqs[row] for row in part])
            for row, token in zip(part, got):
                assert isinstance(token, SampledToken)
                wanted = alone[row][step]
                assert isinstance(wanted, SampledToken)
                assert (token.token_id, token.rank) == (wanted.token_id, wanted.rank)
                assert token.logprob == pytest.approx(wanted.logprob, abs=1e-5)


def test_seeds_differ_and_repeat_and_the_global_state_is_untouched() -> None:
    logits = torch.zeros(1, 1000)
    before = torch.random.get_rng_state()

    def stream(seed: int) -> list[int]:
        seq = make_sequence(SamplingParams(), seed=seed)
        return [ids(sample(logits, [seq]))[0] for _ in range(5)]

    streams = {seed: stream(seed) for seed in (-(2**63), -1, 0, 1, 2**32, 2**63 - 1)}
    assert len({tuple(tokens) for tokens in streams.values()}) == len(streams)
    assert all(stream(seed) == tokens for seed, tokens in streams.items())
    assert torch.equal(torch.random.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------
# Rows that cannot be sampled
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [40, 3000])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(temperature=0, logprobs=1)]
)
def test_a_broken_row_fails_alone(params: SamplingParams, value: float, vocab: int) -> None:
    logits = random_logits(4, vocab)
    wanted = sample(logits, [make_sequence(params, seed=i) for i in range(4)])
    broken = logits.clone()
    broken[2] = value
    got = sample(broken, [make_sequence(params, seed=i) for i in range(4)])
    error = got.pop(2)
    assert isinstance(error, RequestError)
    assert "logits are" in str(error)
    assert got == wanted[:2] + wanted[3:]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=4)])
def test_one_nan_is_enough(params: SamplingParams) -> None:
    logits = random_logits(1, 2000)
    logits[0, 1234] = math.nan
    [error] = sample(logits, [make_sequence(params)])
    assert isinstance(error, RequestError)
    assert "NaN" in str(error)


def test_bias_outside_the_vocabulary_fails_alone() -> None:
    logits = random_logits(2, 30)
    bad = make_sequence(SamplingParams(temperature=0, logit_bias={30: 1.0}))
    error, fine = sample(logits, [bad, make_sequence()])
    assert isinstance(error, RequestError)
    assert str(error) == "logit_bias has token id 30: expected 0 to 29"
    assert fine == SampledToken(int(logits[1].argmax()))


# --------------------------------------------------------------------------------------------------
# Log-probabilities
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [60, 5003])
@pytest.mark.parametrize("k", [0, 1, 20])
def test_logprobs_are_of_the_raw_distribution(k: int, vocab: int, dtype: torch.dtype) -> None:
    logits = random_logits(8, vocab, spread=1.0).to(dtype)
    forced = SamplingParams(temperature=0, logit_bias={5: 100.0}, logprobs=k)  # mostly outside the best k
    seqs = [make_sequence(SamplingParams(logprobs=k, temperature=3.0), seed=i) for i in range(4)]
    seqs += [make_sequence(forced) for _ in range(4)]
    reference = logits.double().log_softmax(-1)
    for row, token in enumerate(sample(logits, seqs)):
        assert isinstance(token, SampledToken)
        assert row < 4 or token.token_id == 5
        assert token.logprob == pytest.approx(float(reference[row, token.token_id]), abs=1e-4)
        assert token.rank == 1 + int((logits[row] > logits[row, token.token_id]).sum())
        assert len(token.top) == k
        assert [value for _, value in token.top] == pytest.approx(
            reference[row].topk(k).values.tolist(), abs=1e-4
        )
        for top_id, value in token.top:
            assert value == pytest.approx(float(reference[row, top_id]), abs=1e-4)


def test_no_logprobs_unless_asked() -> None:
    both = [make_sequence(), make_sequence(SamplingParams(temperature=0, logprobs=1))]
    without, with_them = sample(random_logits(2, 40), both)
    assert isinstance(without, SampledToken)
    assert isinstance(with_them, SampledToken)
    assert (without.logprob, without.top, without.rank) == (None, (), None)
    assert with_them.rank == 1
    assert len(with_them.top) == 1


@pytest.mark.parametrize("elements", [1, 130, 10**6])
def test_prompt_logprobs_in_slices(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "PROMPT_SLICE_ELEMENTS", elements)
    logits = random_logits(11, 60)
    next_ids = list(range(11))
    reference = logits.log_softmax(-1)
    found = prompt_logprobs(logits, next_ids, 3)
    assert [token.token_id for token in found] == next_ids
    for row, token in enumerate(found):
        assert token.logprob == pytest.approx(float(reference[row, row]), abs=1e-5)
        assert token.rank == 1 + int((logits[row] > logits[row, row]).sum())
        assert [top_id for top_id, _ in token.top] == logits[row].topk(3).indices.tolist()


def test_broken_prompt_logits_are_an_error() -> None:
    logits = random_logits(3, 20)
    logits[1, 4] = math.nan
    with pytest.raises(RequestError, match="NaN"):
        prompt_logprobs(logits, [0, 1, 2], 1)
