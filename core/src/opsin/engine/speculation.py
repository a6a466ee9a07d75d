"""Speculation: guess a sequence's next tokens from its own text, compute them at once, keep what is right.

A guess (*draft*) is what followed the same few tokens earlier in the prompt or the answer. The step that
computes the next token computes the draft's tokens with it; each row then chooses its token as it would have
without a draft, and the first one that differs from the draft ends the run. Docs: decisions 85 and 86.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import accumulate

from torch import Tensor

from opsin.api import TopK
from opsin.config import SpeculativeConfig
from opsin.engine.sampler import is_plain_greedy, sample
from opsin.engine.sequence import SampledToken, Sequence
from opsin.errors import RequestError

MAX_STEP_DRAFTS = 64
"""Most drafted tokens in a step: each is a row of logits, which is as wide as the vocabulary."""

MAX_CANDIDATES = 16
"""Most earlier places looked at for the longest match, so that no text makes a lookup slow."""

ROWS_PER_STEP_COST = 8
"""Rows that cost as much to compute as a step's fixed part, the reading of the weights; see decision 86."""

FIRST_CHANCE, LEAST_CHANCE, MOST_CHANCE = 0.5, 0.02, 0.98
"""Probability that a drafted token is right: before anything is known, and the bounds of the estimate."""

WEIGHT = 0.125
"""Least weight of one more observation in that estimate."""

MARGIN = 1.25
"""How much more than its cost a drafted token has to promise, because the estimate is one."""

FIRST_REST, MOST_REST = 4, 64
"""Steps without a draft after a single guess in bad times was wrong; doubled each time."""

HOLE = -1
"""Stands in the text for a medium's embedding, which is no token to match or to guess."""


# ---- Guessing ------------------------------------------------------------------------------------


class NgramIndex:
    """Where short runs of tokens stand in one growing text. A new token costs constant time.

    Args:
        shortest: tokens at the end of the text that must stand at an earlier place.
        longest: tokens that are compared; of several places the longest match counts, then the latest.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self._longest = shortest, longest
        self._text: list[int] = []
        self._latest: dict[
            tuple[int, ...], int
        ] = {}  # a run of ``shortest`` tokens -> where its last one ends
        self._before = array("q", [0])  # where a run ends -> where the same one ended before it; 0: nowhere

    def __len__(self) -> int:
        return len(self._text)

    def extend(self, tokens: SequenceOf[int]) -> None:
        """Append tokens to the text."""
        text, size = self._text, self._shortest
        text += tokens
        # The run at the very end is not entered yet: it would be found as its own match.
        for end in range(len(self._before), len(text)):
            run = tuple(text[end - size : end]) if end >= size else ()
            if not run or HOLE in run:
                self._before.append(0)
            else:
                self._before.append(self._latest.get(run, 0))
                self._latest[run] = end

    def guess(self, count: int) -> list[int]:
        """The tokens that followed the longest earlier match of the text's end: at most ``count``."""
        text = self._text
        best, best_size = 0, self._shortest - 1
        end = self._latest.get(tuple(text[-self._shortest :]), 0)
        for _ in range(MAX_CANDIDATES):
            if not end or best_size == self._longest:
                break
            size, most = self._shortest, min(self._longest, end)
            while size < most and text[end - 1 - size] == text[-1 - size] != HOLE:
                size += 1
            if size > best_size:
                best, best_size = end, size
            end = self._before[end]
        if not best:
            return []
        # A match that reaches into the text's end repeats: the guess goes on in itself.
        period = len(text) - best
        found: list[int] = []
        for place in range(count):
            token = text[best + place] if place < period else found[place - period]
            if token == HOLE:
                break
            found.append(token)
        return found


class _Trust:
    """How long a sequence's drafts should be, from how they have fared.

    A draft's token j is right only if all before it are: its chance is ``chance ** j``. It is worth its row
    while that is clearly more than what a row costs, in tokens. Where not even one is, single guesses are
    made now and then, ever more seldom while they are wrong.
    """

    def __init__(self) -> None:
        self.chance = FIRST_CHANCE
        self._num_seen = 0
        self._rest, self._next_rest = 0, FIRST_REST
        self._probing = False

    def length(self, cost: float) -> int:
        """Most tokens worth drafting where one row costs as much as ``cost`` tokens, between 0 and 1."""
        needed = cost * MARGIN
        if needed >= 1:
            return 0
        self._probing = self.chance < needed
        if not self._probing:
            return int(math.log(needed) / math.log(self.chance) + 1e-9)
        if self._rest > 0:
            self._rest -= 1
            return 0
        return 1

    def learn(self, num_right: int, wrong: bool) -> None:
        """Take the fate of a draft: tokens that were right, and whether the next one was wrong."""
        for outcome in (1.0,) * num_right + (0.0,) * wrong:
            # The first few count alike, with the guess that one of two would be right (Laplace's rule).
            self._num_seen += 1
            weight = max(WEIGHT, 1 / (self._num_seen + 2))
            self.chance += weight * (outcome - self.chance)
        self.chance = min(max(self.chance, LEAST_CHANCE), MOST_CHANCE)
        if num_right:
            self._rest, self._next_rest = 0, FIRST_REST
        elif self._probing:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, MOST_REST)


class _State:
    """What is kept for one sequence, in `Sequence.drafter_state`."""

    def __init__(self, sequence: Sequence, config: SpeculativeConfig) -> None:
        self.trust = _Trust()
        self._index = NgramIndex(config.shortest_match, config.longest_match)
        prompt = list(sequence.prompt.token_ids)
        for item in sequence.media:
            for place, is_embed in enumerate(item.is_embed, start=item.start):
                if is_embed:
                    prompt[place] = HOLE
        self._index.extend(prompt)
        params = sequence.params
        self._ends = frozenset(params.stop_token_ids or ())
        self._ends |= frozenset() if params.ignore_eos else sequence.eos_token_ids

    def guess(self, sequence: Sequence, count: int) -> list[int]:
        """At most ``count`` tokens, up to the first that would end the answer."""
        self._index.extend(sequence.token_ids[len(self._index) :])
        found = self._index.guess(count)
        return found[: next((i for i, token in enumerate(found) if token in self._ends), len(found))]


@dataclass(eq=False)
class Drafter:
    """Makes drafts for all sequences, and counts how they fare.

    Attributes:
        config: the user's limits.
        max_len: most tokens of prompt and answer together.
        num_drafts: drafts verified so far.
        num_draft_tokens: their tokens.
        num_accepted_per_pos: of these, tokens that were right, by their place in the draft.
    """

    config: SpeculativeConfig
    max_len: int
    num_drafts: int = field(default=0, init=False)
    num_draft_tokens: int = field(default=0, init=False)
    num_accepted_per_pos: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.num_accepted_per_pos = [0] * self.config.num_speculative_tokens

    @property
    def num_accepted(self) -> int:
        """Drafted tokens that were right so far."""
        return sum(self.num_accepted_per_pos)

    def draft(self, sequence: Sequence, num_rows: int, room: int) -> tuple[int, ...]:
        """Tokens that may follow those of a sequence; none where a guess would not pay.

        Args:
            sequence: one whose next token is about to be computed.
            num_rows: sequences of which this is true, all of which share the step's fixed cost.
            room: most tokens that there is room for.
        """
        limit = min(room, self.config.num_speculative_tokens, self._most_useful(sequence))
        if limit <= 0:
            return ()
        cost = num_rows / (num_rows + ROWS_PER_STEP_COST)
        limit = min(limit, self._state(sequence).trust.length(cost))
        draft = self.guess(sequence, limit) if limit else []
        if draft and sequence.grammar is not None:
            draft = draft[: sequence.grammar.num_valid(sequence.output_ids, draft)]
        return tuple(draft)

    def guess(self, sequence: Sequence, count: int) -> list[int]:
        """At most ``count`` tokens that may come next; none where the text says nothing."""
        return self._state(sequence).guess(sequence, count)

    def learn(self, sequence: Sequence, draft: SequenceOf[int], chosen: SequenceOf[int]) -> None:
        """Take the tokens that were chosen where ``draft`` was verified."""
        pairs = list(zip(draft, chosen))
        num_right = next((i for i, (guess, token) in enumerate(pairs) if guess != token), len(pairs))
        self._state(sequence).trust.learn(num_right, wrong=num_right < len(pairs))
        self.num_drafts += 1
        self.num_draft_tokens += len(draft)
        for place in range(num_right):
            self.num_accepted_per_pos[place] += 1

    def _state(self, sequence: Sequence) -> _State:
        if sequence.drafter_state is None:
            sequence.drafter_state = _State(sequence, self.config)
        state: _State = sequence.drafter_state
        return state

    def _most_useful(self, sequence: Sequence) -> int:
        """Tokens of a draft that may be kept: one more follows them, before the answer's and context's end.

        All rows of a step are computed for one length variant.
        """
        if sequence.pooling is not None:
            return 0
        most = self.max_len
        if sequence.params.max_tokens is not None:
            most = min(most, sequence.num_prompt + sequence.params.max_tokens)
        most_useful = most - sequence.num_tokens - 1
        if sequence.switch_length is not None:
            most_useful = min(most_useful, sequence.switch_length - sequence.num_tokens)
        return most_useful


# ---- Verifying -----------------------------------------------------------------------------------


def sample_runs(
    logits: Tensor, sequences: SequenceOf[Sequence], drafts: SequenceOf[tuple[int, ...]], top_k: TopK
) -> list[list[SampledToken] | RequestError]:
    """Choose the next tokens of every sequence: one, and one more for each token of its draft that is right.

    Each row's token is chosen by `sample` as if there were no draft, from the sequence with the tokens that
    were kept before it and with its own generator. So a token t has its own probability p(t): a draft is kept
    with probability p(draft), and replaced by another token from p without the draft. That is rejection
    sampling from a proposal that is certain (Leviathan et al. 2023, algorithm 1), and also the very tokens
    that the same seed gives without drafts.

    Args:
        logits: (sum of ``len(draft) + 1``, V); a sequence's rows stand together.
        sequences: their tokens are as before when this returns or raises.
        drafts: one for each sequence, possibly empty.
        top_k: searches rows.

    Returns:
        For each sequence its new tokens, at least one, or why the first could not be chosen. An error at a
        later row leaves the tokens before it; that row comes again.
    """
    first = list(accumulate((len(draft) + 1 for draft in drafts), initial=0))
    lengths = [sequence.num_tokens for sequence in sequences]
    plain = [is_plain_greedy(sequence) for sequence in sequences]
    runs: list[list[SampledToken]] = [[] for _ in sequences]
    errors: dict[int, RequestError] = {}
    going = set(range(len(sequences)))
    try:
        while going:
            # All rows at once where none depends on an earlier one's token; otherwise one after another.
            asked = [
                (index, place)
                for index in sorted(going)
                for place in (range(len(drafts[index]) + 1) if plain[index] else (len(runs[index]),))
            ]
            rows = [first[index] + place for index, place in asked]
            part = logits if len(rows) == len(logits) else logits[rows]
            tokens = sample(part, [sequences[index] for index, _ in asked], top_k)
            for (index, place), token in zip(asked, tokens):
                if index not in going:
                    continue
                if isinstance(token, RequestError):
                    errors[index] = token
                    going.remove(index)
                    continue
                runs[index].append(token)
                if drafts[index][place : place + 1] == (token.token_id,):
                    sequences[index].token_ids.append(token.token_id)
                else:
                    going.remove(index)
    except Exception:
        for sequence in sequences:  # tried again, other tokens may be chosen than were counted there
            sequence.sampler_state = None
        raise
    finally:
        for sequence, length in zip(sequences, lengths):
            del sequence.token_ids[length:]
    return [run or errors[index] for index, run in enumerate(runs)]
