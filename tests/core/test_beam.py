"""Beam search against one that looks at every candidate, against enumeration, and against transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin import LLM
from opsin.api import ProcessedPrompt
from opsin.engine.beam import beam_search
from opsin.errors import RequestError
from opsin.params import BeamSearchParams, SamplingParams
from opsin.results import BeamSearchOutput, CompletionOutput, Logprob, RequestOutput

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT_LEN = 2


class LetterTokenizer:
    """Token 0 is "a", 1 is "b", and so on."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(char) - ord("a") for char in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)

    def convert_tokens_to_ids(self, tokens: str) -> int:
        return ord(tokens) - ord("a")


class TableModel:
    """Log-probabilities of the next token that depend on everything before it."""

    def __init__(self, vocab: int, seed: int, impossible: float = 0.0) -> None:
        self.vocab, self.seed, self.impossible = vocab, seed, impossible

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        generator = torch.Generator().manual_seed(hash((self.seed, *token_ids)) % 2**31)
        logits = torch.randn(self.vocab, generator=generator, dtype=torch.float64)
        logits[1:][torch.rand(self.vocab - 1, generator=generator) < self.impossible] = -math.inf
        values: list[float] = logits.log_softmax(-1).tolist()
        return values


class TableEngine:
    """An engine that runs a table model, a few requests a step, last come first."""

    def __init__(self, model: TableModel, *, fails_on: int | None = None) -> None:
        self.model, self.fails_on = model, fails_on
        self.queue: list[tuple[str, ProcessedPrompt, SamplingParams]] = []
        self.batch_sizes: list[int] = []
        self.longest = 0

    def add(self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams) -> None:
        assert (params.max_tokens, params.greedy) == (1, True)
        assert request_id not in [name for name, _, _ in self.queue]
        if len(prompt.token_ids) > 50:
            raise RequestError("too long")
        self.queue.append((request_id, prompt, params))
        self.longest = max(self.longest, len(prompt.token_ids))

    def step(self) -> list[RequestOutput]:
        assert self.queue, "a step without work"
        self.batch_sizes.append(len(self.queue))
        taken, self.queue = self.queue[-3:][::-1], self.queue[:-3]
        return [self._answer(*request) for request in taken]

    def abort(self, request_id: str) -> RequestOutput | None:
        self.queue = [entry for entry in self.queue if entry[0] != request_id]
        return None

    def _answer(self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams) -> RequestOutput:
        ids = list(prompt.token_ids)
        if self.fails_on is not None and self.fails_on in ids:
            return RequestOutput(request_id, None, ids, None, [], finished=True, error=RequestError("bad"))
        values = self.model.logprobs(ids)
        assert params.logprobs is not None
        best = sorted(range(self.model.vocab), key=lambda token: -values[token])[: params.logprobs]
        entries = {token: Logprob(values[token], rank) for rank, token in enumerate(best, start=1)}
        sample = CompletionOutput(0, "", best[:1], None, [entries], "length")
        return RequestOutput(request_id, None, ids, None, [sample], finished=True)


def search(
    engine: TableEngine,
    params: BeamSearchParams,
    *,
    eos: Sequence[int] = (),
    prompts: Sequence[tuple[int, int]] = ((0, 0),),
    max_len: int = 100,
) -> list[BeamSearchOutput]:
    return beam_search(
        engine,
        [ProcessedPrompt(token_ids=prompt) for prompt in prompts],
        params,
        tokenizer=LetterTokenizer(),
        eos_token_ids=eos,
        max_len=max_len,
    )


def oracle(
    model: TableModel, params: BeamSearchParams, eos: Sequence[int]
) -> list[tuple[tuple[int, ...], float]]:
    """Every candidate looked at, never stopped early -> (tokens, score), best first."""
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    results = []
    for length in range(1, params.max_tokens + 1):
        candidates = [
            ((*tokens, token), total + value)
            for tokens, total in beams
            for token, value in enumerate(model.logprobs([0, 0, *tokens]))
            if value > -math.inf
        ]
        candidates.sort(key=lambda candidate: -candidate[1])
        for tokens, total in candidates[: params.beam_width]:
            if tokens[-1] in eos or length == params.max_tokens:
                results.append((tokens, total / length**params.length_penalty))
        beams = [beam for beam in candidates if beam[0][-1] not in eos][: params.beam_width]
    return sorted(results, key=lambda result: -result[1])[: params.beam_width]


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(2, 12),
    width=st.integers(1, 6),
    max_tokens=st.integers(1, 6),
    penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]),
    num_eos=st.integers(0, 2),
    impossible=st.sampled_from([0.0, 0.6]),
)
def test_search_is_the_oracles(
    seed: int, vocab: int, width: int, max_tokens: int, penalty: float, num_eos: int, impossible: float
) -> None:
    model = TableModel(vocab, seed, impossible)
    params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, length_penalty=penalty)
    eos = range(1, 1 + num_eos)
    [output] = search(TableEngine(model), params, eos=eos)
    wanted = oracle(model, params, eos)
    assert [tuple(s.tokens) for s in output.sequences] == [tokens for tokens, _ in wanted]
    assert [s.score for s in output.sequences] == pytest.approx([score for _, score in wanted])
    for sequence in output.sequences:
        assert sequence.score == pytest.approx(sequence.cum_logprob / len(sequence.tokens) ** penalty)
        ended = sequence.tokens[-1] in eos
        assert sequence.finish_reason == ("stop" if ended else "length")
        assert sequence.text == LetterTokenizer().decode(sequence.tokens[:-1] if ended else sequence.tokens)


def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all() -> None:
    model = TableModel(2, seed=4)
    [output] = search(TableEngine(model), BeamSearchParams(beam_width=8, max_tokens=3))

    def total(tokens: Sequence[int]) -> float:
        return sum(model.logprobs([0, 0, *tokens[:i]])[token] for i, token in enumerate(tokens))

    every = sorted(product(range(2), repeat=3), key=lambda tokens: -total(tokens))
    assert [tuple(s.tokens) for s in output.sequences] == every
    assert [s.cum_logprob for s in output.sequences] == pytest.approx([total(tokens) for tokens in every])


@pytest.mark.parametrize("number", [0, 1, 3, 7])
def test_every_token_is_told_with_what_it_was_chosen_from(number: int) -> None:
    model, eos = TableModel(9, seed=8), [1, 2]
    plain = BeamSearchParams(beam_width=3, max_tokens=5)
    [output] = search(TableEngine(model), replace(plain, logprobs=number), eos=eos)
    [same] = search(TableEngine(model), plain, eos=eos)
    assert [s.tokens for s in output.sequences] == [s.tokens for s in same.sequences]
    assert all(s.logprobs is None for s in same.sequences)
    for sequence in output.sequences:
        assert sequence.logprobs is not None
        chosen = [step[token].logprob for token, step in zip(sequence.tokens, sequence.logprobs, strict=True)]
        assert sum(chosen) == pytest.approx(sequence.cum_logprob)
        for place, step in enumerate(sequence.logprobs):
            values = model.logprobs([0, 0, *sequence.tokens[:place]])
            best = sorted(range(9), key=lambda token: -values[token])[:number]
            assert set(step) == {*best, sequence.tokens[place]}
            assert {token: entry.logprob for token, entry in step.items()} == {t: values[t] for t in step}


def test_ignored_eos_does_not_end() -> None:
    model = TableModel(4, seed=1)
    params = BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True)
    [output] = search(TableEngine(model), params, eos=[0, 1, 2, 3])
    assert [tuple(s.tokens) for s in output.sequences] == [tokens for tokens, _ in oracle(model, params, [])]


def test_prompts_share_batches_and_do_not_disturb_each_other() -> None:
    model, params = TableModel(9, seed=2), BeamSearchParams(beam_width=4, max_tokens=5)
    prompts = [(0, 0), (1, 2), (3, 3)]
    alone = [search(TableEngine(model), params, eos=[8], prompts=[prompt])[0] for prompt in prompts]
    engine = TableEngine(model)
    assert search(engine, params, eos=[8], prompts=prompts) == alone
    assert max(engine.batch_sizes) > params.beam_width


def test_the_context_ends_the_search() -> None:
    engine = TableEngine(TableModel(5, seed=3))
    [output] = search(engine, BeamSearchParams(beam_width=2, max_tokens=9), max_len=PROMPT_LEN + 3)
    assert [len(s.tokens) for s in output.sequences] == [3, 3]
    assert engine.longest == PROMPT_LEN + 2


def test_hopeless_beams_are_given_up() -> None:
    class Decided(TableModel):
        def logprobs(self, token_ids: Sequence[int]) -> list[float]:
            return [math.log(p) for p in (0.001, 0.998, 0.0005, 0.0005)]

    engine = TableEngine(Decided(4, 0))
    params = BeamSearchParams(beam_width=1, max_tokens=40, length_penalty=0)
    [output] = search(engine, params, eos=[1])
    assert [s.tokens for s in output.sequences] == [[1]]
    assert len(engine.batch_sizes) == 1


def test_a_beam_that_may_still_win_by_its_length_goes_on() -> None:
    class LateWinner(TableModel):
        def logprobs(self, token_ids: Sequence[int]) -> list[float]:
            first = len(token_ids) == PROMPT_LEN
            return [math.log(p) for p in ((0.39, 0.6, 0.01) if first else (0.98, 0.01, 0.01))]

    [output] = search(TableEngine(LateWinner(3, 0)), BeamSearchParams(beam_width=1, max_tokens=4), eos=[1])
    assert [s.tokens for s in output.sequences] == [[0, 0, 0, 0]]


def test_a_bad_prompt_fails_alone() -> None:
    model, params = TableModel(5, seed=6), BeamSearchParams(beam_width=2, max_tokens=3)
    fine = search(TableEngine(model), params)[0]
    engine = TableEngine(model, fails_on=9)
    outputs = search(engine, params, prompts=[(0, 0), (9, 9), (0, 0)])
    assert outputs[0] == outputs[2] == fine
    assert outputs[1].sequences == []
    assert str(outputs[1].error) == "bad"
    refused = beam_search(
        engine,
        [ProcessedPrompt(token_ids=[0] * 51), ProcessedPrompt(token_ids=(0, 0))],
        params,
        tokenizer=LetterTokenizer(),
        eos_token_ids=(),
        max_len=100,
    )
    assert str(refused[0].error) == "too long"
    assert refused[1] == fine


def test_an_interruption_leaves_nothing_in_the_engine() -> None:
    class Interrupted(TableEngine):
        def step(self) -> list[RequestOutput]:
            if len(self.batch_sizes) == 2:
                raise KeyboardInterrupt
            return super().step()

    engine = Interrupted(TableModel(9, seed=0))
    with pytest.raises(KeyboardInterrupt):
        search(engine, BeamSearchParams(beam_width=5, max_tokens=5))
    assert engine.queue == []


# --------------------------------------------------------------------------------------------------
# On the real engine
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(GOLDEN / "qwen2vl" / "model"), dtype="float32", kv_cache_memory=2**24) as loaded:
        yield loaded


@pytest.mark.parametrize(("width", "penalty"), [(2, 1.0), (4, 0.0), (5, 2.0)])
@pytest.mark.parametrize("with_eos", [False, True])
def test_sequences_and_scores_are_those_of_transformers(
    llm: LLM, width: int, penalty: float, with_eos: bool
) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    prompt = "What is shown in this image?"
    ids = torch.tensor([llm.get_tokenizer().encode(prompt)])
    # A random model never ends by itself: make a token that it likes the end.
    [greedy] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    eos = greedy.outputs[0].token_ids[-1:] if with_eos else []
    reference = Qwen2VLForConditionalGeneration.from_pretrained(
        GOLDEN / "qwen2vl" / "model", dtype=torch.float32
    )
    wanted = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=7,
        length_penalty=penalty,
        early_stopping="never",
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=eos or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    [output] = beam_search(
        llm.engine,
        [llm.engine.frontend.processor.process(prompt)],
        BeamSearchParams(beam_width=width, max_tokens=7, length_penalty=penalty),
        tokenizer=llm.get_tokenizer(),
        eos_token_ids=eos,
        max_len=100,
    )
    if penalty <= 1:  # a higher one favours long sequences so much that none of those that end stays
        assert any(s.finish_reason == "stop" for s in output.sequences) == with_eos
    expected = [
        row[: len(s.tokens)] for row, s in zip(wanted.sequences[:, ids.shape[1] :].tolist(), output.sequences)
    ]
    assert [s.tokens for s in output.sequences] == expected
    assert [s.score for s in output.sequences] == pytest.approx(wanted.sequences_scores.tolist(), abs=1e-4)


def test_one_beam_is_greedy_also_after_a_picture(llm: LLM) -> None:
    prompt = {
        "prompt": "<|vision_start|><|image_pad|><|vision_end|>What is this?",
        "multi_modal_data": {"image": Image.open(GOLDEN / "images" / "cat_150x240.png")},
    }
    [greedy] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8, logprobs=0), use_tqdm=False)
    [output] = llm.beam_search(prompt, BeamSearchParams(beam_width=1, max_tokens=8))
    [sequence] = output.sequences
    assert sequence.tokens == greedy.outputs[0].token_ids
    assert sequence.text == greedy.outputs[0].text
    assert sequence.cum_logprob == pytest.approx(greedy.outputs[0].cumulative_logprob, abs=1e-4)
