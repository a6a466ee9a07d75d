"""Beam search over the engine's ordinary requests: one token of one beam is one request.

A beam goes on as a new prompt, the old one with its tokens appended; the prefix cache supplies what was
computed before. All beams of all prompts run in the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import NamedTuple, Protocol

from opsin.api import ProcessedPrompt, Tokenizer
from opsin.engine.text import Detokenizer
from opsin.errors import RequestError
from opsin.params import MAX_LOGPROBS, BeamSearchParams, SamplingParams
from opsin.results import BeamSearchOutput, BeamSearchSequence, Logprob, Output, RequestOutput


class StepEngine(Protocol):
    """What beam search needs of `opsin.engine.Engine`."""

    def add(self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams) -> None: ...

    def step(self) -> Sequence[Output]: ...

    def abort(self, request_id: str) -> object: ...


def beam_search(
    engine: StepEngine,
    prompts: Sequence[ProcessedPrompt],
    params: BeamSearchParams,
    *,
    tokenizer: Tokenizer,
    eos_token_ids: Collection[int],
    max_len: int,
) -> list[BeamSearchOutput]:
    """Find the most probable continuations of each prompt.

    At every step the candidates are all beams' continuations, ranked by cumulative log-probability. Those
    among the best ``beam_width`` that end are results; the best ``beam_width`` that do not end go on. A
    search stops at the limit, or when no beam can still beat the results. The selection is that of
    transformers with ``early_stopping="never"``.

    Args:
        engine: one without other requests, whose outputs would be lost.
        prompts: one search each.
        params: width, limit and length penalty.
        tokenizer: decodes the results.
        eos_token_ids: ids that end a continuation unless ``params.ignore_eos``.
        max_len: most tokens of prompt and continuation together.

    Returns:
        At most ``beam_width`` sequences for each prompt, in the order of the prompts. A prompt that the
        engine refuses has ``error`` set; the others go on.
    """
    searches = [BeamSearch(prompt, params, eos_token_ids, max_len) for prompt in prompts]
    numbers = count()
    asked: dict[str, tuple[BeamSearch, int]] = {}

    def ask(search: BeamSearch) -> None:
        for index, prompt in enumerate(search.prompts()):
            request_id = f"beam-{next(numbers)}"
            try:
                engine.add(request_id, prompt, search.one_token)
            except RequestError as error:
                search.error = error
                return
            asked[request_id] = search, index

    try:
        for search in searches:
            ask(search)
        while asked:
            for output in engine.step():
                if isinstance(output, RequestOutput) and output.finished and output.request_id in asked:
                    search, index = asked.pop(output.request_id)
                    if search.take(index, output):
                        ask(search)
    finally:
        for request_id in asked:  # only after an interruption is there anything left
            engine.abort(request_id)
    return [search.output(tokenizer) for search in searches]


class _Beam(NamedTuple):
    """A continuation, its log-probability, whether it has ended, and what each step chose from.

    ``steps`` has nothing unless log-probabilities are asked for.
    """

    tokens: tuple[int, ...]
    cum_logprob: float
    ended: bool = False
    steps: tuple[Mapping[int, Logprob], ...] = ()


class BeamSearch:
    """The search for one prompt's continuations.

    Each round asks for one token after each of `prompts`, and begins when `take` has the answers of the last.

    Attributes:
        error: why the search failed, or None.
    """

    def __init__(
        self, prompt: ProcessedPrompt, params: BeamSearchParams, eos_token_ids: Collection[int], max_len: int
    ) -> None:
        """Arguments as for `beam_search`."""
        self.error: RequestError | None = None
        self._prompt = prompt
        self._params = params
        self._ends = frozenset(() if params.ignore_eos else eos_token_ids)
        self._max_tokens = min(params.max_tokens, max_len - len(prompt.token_ids))
        self._beams = [_Beam((), 0.0)]  # live ones, best first
        self._results: list[_Beam] = []  # ended ones, best score first, at most ``beam_width``
        self._next_tokens: dict[int, Mapping[int, Logprob]] = {}

    @property
    def one_token(self) -> SamplingParams:
        """The parameters to ask for the next token of a beam."""
        wanted = max(self._params.beam_width + len(self._ends), self._params.logprobs or 0)
        num_candidates = min(wanted, MAX_LOGPROBS)
        return SamplingParams(max_tokens=1, temperature=0, logprobs=num_candidates)

    def prompts(self) -> list[ProcessedPrompt]:
        """The prompt with each beam's tokens appended.

        Positions need no change: ``delta`` carries them on.
        """
        ids = self._prompt.token_ids
        return [replace(self._prompt, token_ids=[*ids, *beam.tokens]) for beam in self._beams]

    def take(self, index: int, output: RequestOutput) -> bool:
        """Take the answer for beam ``index``. Returns whether all have come and another round follows."""
        if output.error is not None:
            self.error = output.error
            return False
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None, "logprobs were asked for"
        self._next_tokens[index] = logprobs[0]
        return len(self._next_tokens) == len(self._beams) and self._advance()

    def _advance(self) -> bool:
        """Choose the next beams. Returns whether one of them can become a result."""
        candidates = []
        for index, beam in enumerate(self._beams):
            step = self._next_tokens.pop(index)
            steps = beam.steps if self._params.logprobs is None else (*beam.steps, step)
            candidates += [
                _Beam((*beam.tokens, token), beam.cum_logprob + entry.logprob, token in self._ends, steps)
                for token, entry in step.items()
                if entry.logprob > float("-inf")
            ]
        candidates.sort(key=lambda beam: -beam.cum_logprob)  # stable: equals stay in the beams' order
        width = self._params.beam_width
        length = len(self._beams[0].tokens) + 1
        last = length == self._max_tokens
        self._results += [beam for beam in candidates[:width] if beam.ended or last]
        self._results.sort(key=lambda beam: -self._score(beam))
        del self._results[width:]
        self._beams = [] if last else [beam for beam in candidates if not beam.ended][:width]
        return bool(self._beams) and self._can_improve(length)

    def _score(self, beam: _Beam) -> float:
        """Log-probability, normalised by length."""
        return beam.cum_logprob / math.pow(len(beam.tokens), self._params.length_penalty)

    def _can_improve(self, length: int) -> bool:
        """Whether a live beam of ``length`` tokens can still become a result.

        Its log-probability cannot rise; a positive penalty exponent favours the longest continuation, a
        negative one the shortest.
        """
        if len(self._results) < self._params.beam_width:
            return True
        penalty = self._params.length_penalty
        best_length = self._max_tokens if penalty > 0 else length + 1
        return self._beams[0].cum_logprob / math.pow(best_length, penalty) > self._score(self._results[-1])

    def _logprobs(self, beam: _Beam) -> list[dict[int, Logprob]] | None:
        """For each token of a beam itself and the best ones, as many as are asked for."""
        number = self._params.logprobs
        if number is None:
            return None
        return [
            {token: step[token], **dict(islice(step.items(), number))}
            for token, step in zip(beam.tokens, beam.steps, strict=True)
        ]

    def output(self, tokenizer: Tokenizer) -> BeamSearchOutput:
        """The results with their text."""
        if self.error is not None:
            return BeamSearchOutput(sequences=[], error=self.error)
        sequences = []
        for beam in self._results:
            detokenizer = Detokenizer(tokenizer, self._prompt.token_ids, skip_special_tokens=True)
            shown = beam.tokens[:-1] if beam.ended else beam.tokens
            sequences.append(
                BeamSearchSequence(
                    tokens=list(beam.tokens),
                    text="".join(map(detokenizer.push, shown)) + detokenizer.flush(),
                    cum_logprob=beam.cum_logprob,
                    score=self._score(beam),
                    finish_reason="stop" if beam.ended else "length",
                    logprobs=self._logprobs(beam),
                )
            )
        return BeamSearchOutput(sequences=sequences)
