"""Logits to token ids, as vLLM does it, reproducible per request whatever else is in the batch.

Order of operations on one row: log-probabilities are taken from the raw logits; then logit bias, the
request's own functions, the masks of allowed tokens, of bad words and of ending tokens before ``min_tokens``,
penalties, the constraint on the text, temperature, min_p, top_k, top_p, and the draw.

Cuts and draws look at a row's best few candidates first and at the whole vocabulary only when the
candidates cannot decide; the result is the same, see docs/decisions/0030-sampling.md.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.api import TopK
from opsin.engine.sequence import SampledToken, Sequence
from opsin.errors import RequestError
from opsin.kernels import top_k as reference_top_k
from opsin.params import LogitsProcessor

CANDIDATES = 128
"""How many of a row's best logits are looked at first; a row they cannot decide looks at 16 times more."""

MIN_TEMPERATURE = 1e-6
"""For float32 logits, a lower temperature is no different from 0."""

PROMPT_SLICE_ELEMENTS = 2**22
"""Most float32 elements of prompt logits worked on at once (16 MiB)."""

SUM_SLICE_ELEMENTS = 2**18
"""Most float32 elements whose weights are summed at once (1 MiB): they stay within a processor's cache."""


def make_generator(seed: int) -> torch.Generator:
    """A sequence's own random source, on the CPU. Any 64-bit integer is a seed, including negative ones."""
    low, high = seed % 2**32, (seed >> 32) % 2**32
    # torch's CPU generator looks at 32 bits only: fold the upper half in, or -1 and 2**32 - 1 are one seed.
    return torch.Generator().manual_seed((low + high * 0x9E3779B9) % 2**32)


def is_plain_greedy(seq: Sequence) -> bool:
    """Whether a token of this sequence, which was sampled before, is its row's best whatever came before."""
    rules = seq.sampler_state
    return isinstance(rules, _Rules) and rules.fixed


def sample(
    logits: Tensor, sequences: SequenceOf[Sequence], top_k: TopK = reference_top_k
) -> list[SampledToken | RequestError]:
    """Choose the next token of every sequence.

    A row depends on its own logits, sequence and generator only. `logits` is left as it is.

    Args:
        logits: (B, V), any floating dtype, any device; worked on in float32.
        sequences: B of them; row i belongs to ``sequences[i]``. Those that are not greedy have a generator.
        top_k: searches rows.

    Returns:
        One entry per row: the token, or the error that ends this row's request and no other (logits that
        are NaN or infinite, a token id outside the vocabulary, a function of the request that raises).
    """
    assert logits.shape[0] == len(sequences), "one row per sequence"
    all_rules = [seq.sampler_state or _Rules(seq, logits) for seq in sequences]
    if all(rules.plain for rules in all_rules):
        return [
            token if isinstance(token, RequestError) else SampledToken(token)
            for token in _best(logits, top_k)
        ]

    chosen: list[int | RequestError] = [0] * len(sequences)
    argmax_rows: list[int] = []
    other_rows: list[int] = []
    for row, (rules, seq) in enumerate(zip(all_rules, sequences)):
        if rules.error is not None:
            chosen[row] = rules.error
        elif rules.params.greedy and not rules.adjusts(seq):
            argmax_rows.append(row)
        else:
            other_rows.append(row)
    if argmax_rows:
        for row, token in zip(argmax_rows, _best(_take_rows(logits, argmax_rows), top_k)):
            chosen[row] = token
    if other_rows:
        work = logits[other_rows].float()
        problems = [all_rules[row].adjust(part, sequences[row]) for row, part in zip(other_rows, work)]
        tokens = _choose(work, [sequences[row] for row in other_rows], top_k)
        for row, problem, token in zip(other_rows, problems, tokens):
            chosen[row] = problem or token
    return _with_logprobs(logits, chosen, all_rules, top_k)


def prompt_logprobs(
    logits: Tensor, next_ids: SequenceOf[int], k: int, top_k: TopK = reference_top_k
) -> list[SampledToken]:
    """Log-probabilities of the tokens that really came next.

    Args:
        logits: (T, V), any floating dtype.
        next_ids: for each row the token that follows it.
        k: how many of the best tokens to report besides it; -1: all.
        top_k: searches rows.

    Returns:
        T entries with logprob, rank and top filled in from the raw distribution.

    Raises:
        RequestError: the logits are NaN or infinite.
    """
    rows = max(1, PROMPT_SLICE_ELEMENTS // logits.shape[1])
    found: list[SampledToken] = []
    for start in range(0, len(next_ids), rows):
        ids = list(next_ids[start : start + rows])
        sizes = [logits.shape[1] if k < 0 else k] * len(ids)
        found += _describe(logits[start : start + len(ids)], ids, sizes, top_k)
    for token in found:
        if token.logprob is None or math.isnan(token.logprob):
            raise _not_finite(math.nan)
    return found


# ---- What a sequence asks for --------------------------------------------------------------------


class _TokenCounts:
    """Tokens a sequence has seen, kept as arrays so that a step costs its new tokens only.

    Attributes:
        ids: distinct token ids, int64; the first `num_ids` entries are in use.
        counts: how often each was generated (0: it was only in the prompt), float32.
    """

    def __init__(self, prompt_ids: SequenceOf[int]) -> None:
        known = sorted(set(prompt_ids))
        self.num_ids = len(known)
        self.num_counted = 0
        self.ids: NDArray[np.int64] = np.zeros(max(64, 2 * len(known)), dtype=np.int64)
        self.ids[: len(known)] = known
        self.counts: NDArray[np.float32] = np.zeros(len(self.ids), dtype=np.float32)
        self._slots = {token: slot for slot, token in enumerate(known)}

    def catch_up(self, seq: Sequence) -> None:
        """Count the tokens generated since the last call."""
        for token in seq.token_ids[seq.num_prompt + self.num_counted :]:
            slot = self._slots.setdefault(token, self.num_ids)
            if slot == self.num_ids:
                if slot == len(self.ids):
                    self.ids = np.concatenate((self.ids, np.zeros_like(self.ids)))
                    self.counts = np.concatenate((self.counts, np.zeros_like(self.counts)))
                self.ids[slot] = token
                self.num_ids += 1
            self.counts[slot] += 1
        self.num_counted = seq.num_output


class _Rules:
    """One sequence's sampling settings, prepared at its first token and kept in `Sequence.sampler_state`.

    Attributes:
        fixed: greedy, and logits change in no step: the row's best token is the answer.
        plain: fixed, and no log-probabilities are asked for.
        bias: (token ids, values to add), or None.
        allowed: ids that alone may be chosen, or None.
        ending: ids that may not be chosen before ``min_tokens``, or None.
        processors: the request's own functions, which take the sequence and its logits.
        restricts: whether they, or lists of tokens, may leave none to choose.
        always: whether logits change in every step.
        counts: tokens to penalise, or None.
        error: why no token can ever be chosen, or None.
    """

    def __init__(self, seq: Sequence, logits: Tensor) -> None:
        seq.sampler_state = self
        params = self.params = seq.params
        vocab, device = logits.shape[1], logits.device
        self.error: RequestError | None = None
        self.bias: tuple[Tensor, Tensor] | None = None
        self.allowed: Tensor | None = None
        for name in ("logit_bias", "allowed_token_ids"):
            outside = [token for token in getattr(params, name) or () if not 0 <= token < vocab]
            if outside:
                self.error = RequestError(f"{name} has token id {outside[0]}: expected 0 to {vocab - 1}")
                self.plain = self.fixed = False
                return
        if params.logit_bias:
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
            self.bias = torch.tensor(list(params.logit_bias), device=device), values
        if params.allowed_token_ids is not None:
            self.allowed = torch.tensor(params.allowed_token_ids, device=device)
        self.processors = [_with_sequence(call) for call in params.logits_processors or ()]
        self.ending: Tensor | None = None
        if params.min_tokens:
            stops = {*seq.eos_token_ids, *(params.stop_token_ids or ())}
            ending = [token for token in stops if 0 <= token < vocab]
            self.ending = torch.tensor(ending, dtype=torch.int64, device=device)
        self.counts: _TokenCounts | None = None
        if params.repetition_penalty != 1:
            self.counts = _TokenCounts(seq.prompt.token_ids)
        elif params.presence_penalty or params.frequency_penalty:
            self.counts = _TokenCounts(())
        self.restricts = bool(self.allowed is not None or self.processors or seq.bad_words)
        self.always = self.restricts or bool(seq.grammar or self.bias or self.counts)
        self.fixed = params.greedy and not self.always and self.ending is None
        self.plain = self.fixed and params.logprobs is None

    def adjusts(self, seq: Sequence) -> bool:
        """Whether logits change in this step before temperature and cuts."""
        blocked = self.ending is not None and seq.num_output < self.params.min_tokens
        return blocked or self.always

    def adjust(self, row: Tensor, seq: Sequence) -> RequestError | None:
        """Apply bias, mask and penalties in place, or say why not. ``row``: float32 (V,)."""
        if self.bias is not None:
            ids, values = self.bias
            row[ids] += values
        for name, call in zip(map(_name, self.params.logits_processors or ()), self.processors):
            try:
                row.copy_(call(seq, row))
            except Exception as problem:  # whatever a user's function does
                return RequestError(f"logits_processors: {name} failed: {type(problem).__name__}: {problem}")
        if self.allowed is not None:
            kept = row[self.allowed]
            row.fill_(-math.inf)
            row[self.allowed] = kept
        for word in seq.bad_words:
            if (
                len(word) <= seq.num_output + 1
                and seq.token_ids[seq.num_tokens - len(word) + 1 :] == word[:-1]
            ):
                row[word[-1]] = -math.inf
        if self.restricts and row.max() == -math.inf:
            return RequestError("allowed_token_ids, bad_words and logits_processors leave no token to choose")
        if self.ending is not None and seq.num_output < self.params.min_tokens:
            row[self.ending] = -math.inf
        if self.counts is not None:
            self.counts.catch_up(seq)
            self._penalise(row, self.counts)
        if seq.grammar is not None:
            try:
                row[~seq.grammar.allowed(seq.output_ids, len(row)).to(row.device)] = -math.inf
            except RequestError as problem:
                return problem
        return None

    def _penalise(self, row: Tensor, seen: _TokenCounts) -> None:
        """Repetition (Keskar et al. 2019, section 4.1), then frequency and presence (OpenAI API)."""
        params = self.params
        ids = torch.from_numpy(seen.ids[: seen.num_ids]).to(row.device)
        counts = torch.from_numpy(seen.counts[: seen.num_ids]).to(row.device)
        values = row[ids]
        penalty = params.repetition_penalty
        if penalty != 1:
            values = torch.where(values > 0, values / penalty, values * penalty)
        values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        row[ids] = values


def _name(call: object) -> str:
    return getattr(call, "__qualname__", type(call).__qualname__)


def _with_sequence(call: LogitsProcessor) -> Callable[[Sequence, Tensor], Tensor]:
    """A user's function, which takes ``(output_ids, logits)`` or ``(prompt_ids, output_ids, logits)``."""
    try:
        takes_prompt = len(inspect.signature(call).parameters) == 3
    except ValueError:  # written in C
        takes_prompt = False
    if takes_prompt:
        return lambda seq, row: call(list(seq.prompt.token_ids), seq.output_ids, row)
    return lambda seq, row: call(seq.output_ids, row)


# ---- Choosing ------------------------------------------------------------------------------------


def _best(logits: Tensor, top_k: TopK) -> list[int | RequestError]:
    """Each row's best token, or why there is none."""
    values, ids = top_k(logits, 1)
    return [
        token if math.isfinite(value) else _not_finite(value)
        for value, token in zip(values[:, 0].tolist(), ids[:, 0].tolist())
    ]


def _choose(logits: Tensor, sequences: SequenceOf[Sequence], top_k: TopK) -> list[int | RequestError]:
    """Choose for rows that are not plainly greedy. ``logits``: adjusted float32 (R, V)."""
    by_width: dict[int, list[int]] = {}
    for row, seq in enumerate(sequences):
        k = seq.params.top_k
        # A power of two, so that rows with like settings share one call; never the neighbours' width.
        width = 1 if seq.params.greedy else max(CANDIDATES, 1 << (k - 1).bit_length() if k else 0)
        by_width.setdefault(min(width, logits.shape[1]), []).append(row)
    chosen: list[int | RequestError] = [0] * len(sequences)
    for width, rows in by_width.items():
        part = _take_rows(logits, rows)
        tokens = _best(part, top_k) if width == 1 else _draw(part, [sequences[r] for r in rows], width, top_k)
        for row, token in zip(rows, tokens):
            chosen[row] = token
    return chosen


def _draw(
    logits: Tensor, sequences: SequenceOf[Sequence], width: int, top_k: TopK
) -> list[int | RequestError]:
    """Temperature, min_p, top_k, top_p and the draw, from the best ``width`` candidates of each row.

    The draw is a race: the winner is argmax(weight / Exp(1) noise), which picks each token with its
    probability (the exponential form of Gumbel-max). All tokens beyond the candidates may enter as one
    runner with their total weight. Computed on the host in float64, since the candidates are few.

    Args:
        logits: adjusted float32 (R, V).
        sequences: R of them.
        width: number of candidates, at most V.
        top_k: searches rows.
    """
    vocab = logits.shape[1]
    params = [seq.params for seq in sequences]
    temperatures = _column([max(p.temperature, MIN_TEMPERATURE) for p in params])
    top_p = _column([p.top_p for p in params])
    best_values, best_ids = top_k(logits, width)
    values, ids = best_values.cpu().double().numpy(), best_ids.cpu().numpy()
    # Weights are relative to the best token's, which is 1: nothing can overflow. Rows with NaN or infinity
    # give NaN here; they are dealt with below.
    with np.errstate(invalid="ignore"):
        weights = np.exp((values - values[:, :1]) / temperatures)
    allowed = weights >= _column([p.min_p for p in params])
    allowed &= np.arange(width) < _column([p.top_k or vocab for p in params])
    weights *= allowed
    sums = weights.sum(-1, keepdims=True)
    # A row is complete if no token beyond the candidates is allowed; others need the weight of the rest.
    complete = ~allowed[:, -1:] | np.array([[0 < p.top_k <= width or width == vocab] for p in params])
    totals = sums if complete.all() else _total_weights(logits, best_values[:, :1], temperatures)
    mass = np.where(complete, sums, totals)
    decided = (top_p == 1) | (sums >= top_p * mass)
    decided &= np.array([[p.min_p == 0] for p in params])
    settled = (complete | decided)[:, 0].tolist()
    before = weights.cumsum(-1) - weights
    weights *= (before < top_p * mass) | (top_p == 1)
    rest = np.where(complete | (top_p < 1), 0.0, np.maximum(totals - sums, 0))

    drawn: list[int | RequestError] = [0] * len(params)
    racing: list[int] = []
    wider: list[int] = []
    for index, value in enumerate(values[:, 0].tolist()):
        if not math.isfinite(value):
            drawn[index] = _not_finite(value)
        elif settled[index]:
            racing.append(index)
        else:
            wider.append(index)
    if racing:
        entered = np.concatenate((ids[racing], np.full((len(racing), 1), -1)), axis=1)
        noise = _exponential([_generator(sequences[index]) for index in racing], entered)
        runners = np.concatenate((weights[racing], rest[racing]), axis=1)
        for index, place in zip(racing, (runners / noise).argmax(-1).tolist()):
            if place < width:
                drawn[index] = int(ids[index, place])
            else:
                drawn[index] = _draw_beyond(logits[index], best_ids[index], sequences[index])
    if wider:
        again = _draw(logits[wider], [sequences[index] for index in wider], min(vocab, width * 16), top_k)
        for index, token in zip(wider, again):
            drawn[index] = token
    return drawn


def _exponential(generators: SequenceOf[torch.Generator], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Exp(1) noise of each token id, (R, n): one number of a row's generator decides it, whatever its place.

    So two tokens whose logits are all but equal may change places among the candidates, as rounding differs
    between batches, and the winner stays. The mixing is splitmix64's (Steele, Lea and Flood 2014).
    """
    seeds = [int(torch.randint(-(2**63), 2**63 - 1, (1,), generator=g)) % 2**64 for g in generators]
    mixed = np.array(seeds, np.uint64)[:, None] + (ids.astype(np.uint64) + np.uint64(2)) * np.uint64(_GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    uniform = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(uniform)


_GOLDEN = 0x9E3779B97F4A7C15


def _column(settings: list[float]) -> NDArray[np.float64]:
    return np.array(settings, dtype=np.float64)[:, None]


def _total_weights(logits: Tensor, best: Tensor, temperatures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over all tokens of exp((logit - best) / temperature): (R, 1)."""
    divisors = torch.from_numpy(temperatures).float().to(logits.device)  # some devices lack float64
    rows_at_once = max(1, SUM_SLICE_ELEMENTS // logits.shape[1])
    sums = [
        (rows - tops).div_(heat).exp_().sum(-1, keepdim=True)
        for rows, tops, heat in zip(*(part.split(rows_at_once) for part in (logits, best, divisors)))
    ]
    return torch.cat(sums).cpu().double().numpy()


def _draw_beyond(logits: Tensor, candidates: Tensor, seq: Sequence) -> int:
    """Draw among all tokens that are not candidates, by inversion of the cumulative distribution.

    Args:
        logits: adjusted float32 (V,).
        candidates: int64 ids, best first.
        seq: one without top_k, top_p and min_p.
    """
    row, candidates = logits.cpu().double(), candidates.cpu()
    weights = ((row - row[candidates[0]]) / max(seq.params.temperature, MIN_TEMPERATURE)).exp()
    weights[candidates] = 0
    cumulative = weights.cumsum(-1)
    total = float(cumulative[-1])
    if total == 0:  # an empty rest won by a rounding error of the total
        return int(candidates[0])
    point = torch.rand(1, dtype=torch.float64, generator=_generator(seq)) * total
    return min(int(torch.searchsorted(cumulative, point, right=True)), int(weights.nonzero()[-1]))


def _generator(seq: Sequence) -> torch.Generator:
    assert seq.generator is not None, "a sequence that is not greedy has a generator"
    return seq.generator


# ---- Log-probabilities ---------------------------------------------------------------------------


def _with_logprobs(
    logits: Tensor, chosen: SequenceOf[int | RequestError], all_rules: SequenceOf[_Rules], top_k: TopK
) -> list[SampledToken | RequestError]:
    """Wrap the chosen ids, with log-probabilities for the rows that asked."""
    tokens = [SampledToken(entry) if isinstance(entry, int) else entry for entry in chosen]
    wanted = [
        (row, entry, logits.shape[1] if rules.params.logprobs < 0 else rules.params.logprobs)
        for row, (entry, rules) in enumerate(zip(chosen, all_rules))
        if isinstance(entry, int) and rules.params.logprobs is not None
    ]
    if wanted:
        rows, ids, sizes = (list(column) for column in zip(*wanted))
        for row, token in zip(rows, _describe(_take_rows(logits, rows), ids, sizes, top_k)):
            tokens[row] = token
    return tokens


def _describe(logits: Tensor, ids: list[int], sizes: list[int], top_k: TopK) -> list[SampledToken]:
    """Log-probability, rank and best tokens for one id per row. ``logits``: raw (R, V)."""
    wide = logits.float()
    norm = wide.logsumexp(-1, keepdim=True)
    picked = wide.gather(1, torch.tensor(ids, device=wide.device).unsqueeze(1))
    width = min(max([1, *sizes]), wide.shape[1])
    values, best = top_k(wide, width)
    ranks = ((values > picked).sum(-1) + 1).tolist()
    # Whatever is more probable than one of the best is one of the best; other tokens need a full count.
    outside = (picked < values[:, -1:]).squeeze(1).nonzero().squeeze(1).tolist()
    if outside:
        for row, count in zip(outside, (wide[outside] > picked[outside]).sum(-1).tolist()):
            ranks[row] = count + 1
    logprobs = (picked - norm).squeeze(1).tolist()
    tops = zip(best.tolist(), (values - norm).tolist())
    return [
        SampledToken(token, logprob, tuple(zip(top_ids[:size], top_values[:size])), rank)
        for token, logprob, (top_ids, top_values), size, rank in zip(ids, logprobs, tops, sizes, ranks)
    ]


def _take_rows(logits: Tensor, rows: SequenceOf[int]) -> Tensor:
    """The given rows, without a copy if they are all."""
    return logits if len(rows) == logits.shape[0] else logits[list(rows)]


def _not_finite(value: float) -> RequestError:
    what = "NaN" if math.isnan(value) else "infinite"
    return RequestError(
        f"the model's logits are {what}: no token can be chosen. float16 may have overflowed (use bfloat16 "
        "or float32), or the checkpoint or an embedding input is damaged"
    )
