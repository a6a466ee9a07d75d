"""Beam search over the engine's ordinary requests: one token of one beam is one request.

A beam goes on as a new prompt, the old one with its tokens appended; what was computed for its prefix comes
from the prefix cache. All beams of all prompts run in the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, Protocol

from opsin.api import ProcessedPrompt, Tokenizer
from opsin.config import MAX_LOGPROBS, BeamSearchParams, SamplingParams
from opsin.engine.text import Detokenizer
from opsin.errors import RequestError
from opsin.results import BeamSearchOutput, BeamSearchSequence, RequestOutput

if TYPE_CHECKING:
    from opsin.results import Logprob, PoolingRequestOutput


class StepEngine(Protocol):
    """What beam search needs of `opsin.engine.Engine`."""

    def add(self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams) -> None: ...

    def step(self) -> Sequence[RequestOutput | PoolingRequestOutput]: ...

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
    search stops at the limit, or when no beam can beat the results any more. The selection is that of
    transformers with ``early_stopping="never"``.

    Args:
        engine: without other requests: their outputs would be lost.
        prompts: one search each.
        params: width, limit and length penalty.
        tokenizer: for the text.
        eos_token_ids: ids that end a continuation unless ``params.ignore_eos``.
        max_len: most tokens of prompt and continuation together.

    Returns:
        At most ``beam_width`` sequences for each prompt, in the order of the prompts. A prompt that the
        engine refuses has ``error`` set; the others go on.
    """
    searches = [BeamSearch.begin(prompt, params, eos_token_ids, max_len) for prompt in prompts]
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
            search.num_open += 1

    try:
        for search in searches:
            ask(search)
        while asked:
            for output in engine.step():
                if not isinstance(output, RequestOutput) or not output.finished:
                    continue
                if output.request_id not in asked:
                    continue
                search, index = asked.pop(output.request_id)
                search.take(index, output)
                if search.num_open == 0 and search.advance():
                    ask(search)
    finally:
        for request_id in asked:  # only after an interruption is there anything left
            engine.abort(request_id)
    return [search.output(tokenizer) for search in searches]


class _Beam(NamedTuple):
    """A continuation, its log-probability, and whether it has ended."""

    tokens: tuple[int, ...]
    cum_logprob: float
    ended: bool = False


@dataclass(eq=False)
class BeamSearch:
    """The search for one prompt's continuations.

    It goes in rounds: ask for one token behind each of `prompts`, `take` the answers, `advance`.

    Attributes:
        beams: live ones, best first; results: ended ones, best score first, at most ``beam_width``.
        num_open: requests of this round not yet answered.
    """

    prompt: ProcessedPrompt
    params: BeamSearchParams
    ends: frozenset[int]
    max_tokens: int
    beams: list[_Beam] = field(default_factory=lambda: [_Beam((), 0.0)])
    results: list[_Beam] = field(default_factory=list)
    num_open: int = 0
    error: RequestError | None = None
    _next_tokens: dict[int, Mapping[int, Logprob]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, prompt: ProcessedPrompt, params: BeamSearchParams, eos_token_ids: Collection[int], max_len: int
    ) -> BeamSearch:
        """A search at its beginning; arguments as for `beam_search`."""
        ends = frozenset(() if params.ignore_eos else eos_token_ids)
        return cls(prompt, params, ends, min(params.max_tokens, max_len - len(prompt.token_ids)))

    @property
    def one_token(self) -> SamplingParams:
        """How the next token of each beam is asked for."""
        num_candidates = min(self.params.beam_width + len(self.ends), MAX_LOGPROBS)
        return SamplingParams(max_tokens=1, temperature=0, logprobs=num_candidates)

    def prompts(self) -> list[ProcessedPrompt]:
        """The prompt with each beam's tokens appended.

        Positions need no change: ``delta`` carries them on.
        """
        ids = self.prompt.token_ids
        return [replace(self.prompt, token_ids=[*ids, *beam.tokens]) for beam in self.beams]

    def take(self, index: int, output: RequestOutput) -> None:
        """Take the answer for beam ``index``."""
        self.num_open -= 1
        if output.error is not None:
            self.error = output.error
            return
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None, "logprobs were asked for"
        self._next_tokens[index] = logprobs[0]

    def advance(self) -> bool:
        """Choose the next beams, all answers being there. Returns whether the search goes on."""
        if self.error is not None:
            return False
        candidates = [
            _Beam((*beam.tokens, token), beam.cum_logprob + entry.logprob, token in self.ends)
            for index, beam in enumerate(self.beams)
            for token, entry in self._next_tokens[index].items()
            if entry.logprob > float("-inf")
        ]
        candidates.sort(key=lambda beam: -beam.cum_logprob)  # stable: equals stay in the beams' order
        self._next_tokens.clear()
        width = self.params.beam_width
        length = len(self.beams[0].tokens) + 1
        last = length == self.max_tokens
        self.results += [beam for beam in candidates[:width] if beam.ended or last]
        self.results.sort(key=lambda beam: -self.score(beam))
        del self.results[width:]
        self.beams = [] if last else [beam for beam in candidates if not beam.ended][:width]
        return bool(self.beams) and self._can_improve(length)

    def score(self, beam: _Beam) -> float:
        """Log-probability, normalised by length."""
        return beam.cum_logprob / math.pow(len(beam.tokens), self.params.length_penalty)

    def _can_improve(self, length: int) -> bool:
        """Whether a live beam of ``length`` tokens can still become a result.

        Its log-probability cannot rise; a positive penalty exponent favours the longest continuation, a
        negative one the shortest.
        """
        if len(self.results) < self.params.beam_width:
            return True
        penalty = self.params.length_penalty
        best_length = self.max_tokens if penalty > 0 else length + 1
        return self.beams[0].cum_logprob / math.pow(best_length, penalty) > self.score(self.results[-1])

    def output(self, tokenizer: Tokenizer) -> BeamSearchOutput:
        """The results with their text."""
        if self.error is not None:
            return BeamSearchOutput(sequences=[], error=self.error)
        return BeamSearchOutput(
            sequences=[
                BeamSearchSequence(
                    tokens=list(beam.tokens),
                    text=self._text(beam, tokenizer),
                    cum_logprob=beam.cum_logprob,
                    score=self.score(beam),
                    finish_reason="stop" if beam.ended else "length",
                )
                for beam in self.results
            ]
        )

    def _text(self, beam: _Beam, tokenizer: Tokenizer) -> str:
        detokenizer = Detokenizer(tokenizer, self.prompt.token_ids, skip_special_tokens=True)
        tokens = beam.tokens[:-1] if beam.ended else beam.tokens
        return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
