"""What a user may set for a request: `SamplingParams` and its siblings.

Unknown names and impossible values are errors at construction. Only `SamplingParams` may be assigned to, as
vLLM's scripts do; a request keeps the values that it came with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated, Any

from opsin.errors import ConfigError, require_known
from opsin.fields import INT64_MAX, INT64_MIN, NonNegative, Positive, Range, check_fields
from opsin.vllm_names import BEAM_SEARCH, POOLING, SAMPLING, STRUCTURED, Renamed, takes_vllm_names

MAX_LOGPROBS = 20


@takes_vllm_names(STRUCTURED)
@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """A constraint on the text of an answer. Exactly one field is set.

    Attributes:
        json: a JSON schema (a dict or its text).
        json_object: any JSON object.
        regex: a regular expression for the whole text.
        choice: one of these texts.
        grammar: a context-free grammar, from ``start`` in Lark's notation or from ``root`` in GBNF.
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ConfigError(
                f"structured output has {given or 'nothing'} set: expected exactly one constraint"
            )
        if self.choice is not None and (not self.choice or not all(self.choice)):
            raise ConfigError("structured output: choice needs at least one text, and none may be empty")


StructuredOutputsParams = GuidedDecodingParams = StructuredOutput
"""vLLM's names."""


class RequestOutputKind(Enum):
    """What each output of a stream holds: all so far, what is new, or (only the last one) all."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


LogitsProcessor = Callable[..., Any]
"""``(output_ids, logits) -> logits``, or ``(prompt_ids, output_ids, logits) -> logits``.

Logits are float32 (V,), a row of the step's batch, which may be changed in place.
"""

_NumLogprobs = Annotated[int, Range(-1, MAX_LOGPROBS)]
_Penalty = Annotated[float, Range(-2, 2)]


@takes_vllm_names(SAMPLING)
@dataclass
class SamplingParams:
    """How tokens are chosen and when a request ends. Field names and meanings are vLLM's.

    Attributes:
        n: samples per prompt.
        temperature: 0 means greedy.
        top_p, top_k, min_p: nucleus, k-best (0: all) and relative-probability cuts.
        seed: makes this request's samples reproducible, whatever else runs alongside.
        stop: end when the text contains one of these; it is cut off unless ``include_stop_str_in_output``.
        stop_token_ids: end after one of these ids; its text is not part of the output.
        ignore_eos: go on after the model's end-of-sequence ids.
        max_tokens: None: up to the context's end.
        min_tokens: no end-of-sequence or stop token before this many.
        presence_penalty, frequency_penalty: subtracted per generated token present / per occurrence.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
        logit_bias: token id -> added to its logit.
        logprobs: return the log-probabilities of this many best tokens (-1: of all), and of the chosen one.
        prompt_logprobs: the same for every prompt token.
        structured: a constraint on the text. vLLM's names are ``structured_outputs``, ``guided_decoding``.
        skip_special_tokens: leave special tokens out of the text.
        priority: whose turn it is, where `EngineConfig.scheduling_policy` is ``"priority"``: smaller numbers
            first, equal ones in the order of arrival.
        bad_words: texts whose tokens are never generated one after the other.
        allowed_token_ids: generate no other tokens.
        logits_processors: functions that change the logits of each token, in order, after ``logit_bias``.
        truncate_prompt_tokens: keep this many of the prompt's last tokens; -1: as many as the context holds.
        detokenize: make text of the tokens.
        output_kind: what each output of a stream holds.
    """

    n: Positive = 1
    temperature: Annotated[float, Range(0)] = 1.0
    top_p: Annotated[float, Range(0, 1)] = 1.0
    top_k: Annotated[int, Range(-1)] = 0
    min_p: Annotated[float, Range(0, 1)] = 0.0
    seed: Annotated[int, Range(INT64_MIN, INT64_MAX)] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: Positive | None = 16
    min_tokens: NonNegative = 0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: Annotated[float, Range(0, 100)] = 1.0
    logit_bias: Mapping[int, Annotated[float, Range(-100, 100)]] | None = None
    logprobs: _NumLogprobs | None = None
    prompt_logprobs: _NumLogprobs | None = None
    structured: StructuredOutput | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    truncate_prompt_tokens: Annotated[int, Range(-1)] | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        values = vars(self)
        if isinstance(self.stop, str):
            values["stop"] = [self.stop]
        for name in ("stop", "stop_token_ids"):
            values[name] = () if values[name] is None else _as_tuple(values[name])
        for name in ("bad_words", "allowed_token_ids", "logits_processors"):
            given = _as_tuple(values[name])
            values[name] = None if given == () else given
        if self.logit_bias is None:
            values["logit_bias"] = {}
        elif isinstance(self.logit_bias, Mapping):  # JSON has texts for keys
            keys = (int(key) if str(key).isdecimal() else key for key in self.logit_bias)
            values["logit_bias"] = dict(zip(keys, self.logit_bias.values()))
        check_fields(self)
        values["top_k"] = max(0, self.top_k)  # -1 is vLLM's older spelling of "all"
        most = INT64_MAX if self.max_tokens is None else self.max_tokens
        for name, fine, expected in (
            ("top_p", self.top_p > 0, "a number greater than 0, at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "a number greater than 0, at most 100"),
            ("stop", all(self.stop_strings), "non-empty strings"),
            ("stop", self.detokenize or not self.stop, "none with detokenize=False: there is no text"),
            ("bad_words", all(map(str.strip, self.bad_words or ())), "non-empty strings"),
            ("min_tokens", self.min_tokens <= most, "between 0 and max_tokens"),
            ("truncate_prompt_tokens", self.truncate_prompt_tokens != 0, "at least 1, or -1"),
        ):
            if not fine:
                raise ConfigError(f"{name}={values[name]!r}: expected {expected}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a field; checked as at construction."""
        if len(vars(self)) == len(self.__dataclass_fields__):
            entry = SAMPLING.get(name)
            name = entry.to if isinstance(entry, Renamed) else name
            require_known("SamplingParams", [name], self.__dataclass_fields__, ConfigError)
            vars(self).update(vars(replace(self, **{name: value})))
        else:  # within the constructor
            vars(self)[name] = value

    def clone(self) -> SamplingParams:
        """A copy."""
        return copy.copy(self)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken (temperature 0, or only one candidate left)."""
        return self.temperature == 0 or self.top_k == 1

    @classmethod
    def from_generation_config(cls, defaults: Mapping[str, Any], **changes: Any) -> SamplingParams:
        """The checkpoint's generation_config.json as defaults, overridden by ``changes``.

        ``do_sample: false`` means greedy; a missing max_new_tokens leaves opsin's default.
        """
        taken = {name: defaults[name] for name in _IN_FILES if defaults.get(name) is not None}
        if defaults.get("do_sample") is False:
            taken["temperature"] = 0.0
        if defaults.get("max_new_tokens") is not None:
            taken["max_tokens"] = defaults["max_new_tokens"]
        return cls(**{**taken, **changes})


_IN_FILES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
GENERATION_CONFIG = (*_IN_FILES, "do_sample", "max_new_tokens")
"""Fields of a generation_config.json that say how answers are sampled."""


@takes_vllm_names(BEAM_SEARCH)
@dataclass(frozen=True)
class BeamSearchParams:
    """Beam search: keep the ``beam_width`` most probable continuations at every step.

    Attributes:
        beam_width: beams kept, and sequences returned.
        max_tokens: longest continuation.
        ignore_eos: beams do not end at an end-of-sequence id.
        length_penalty: a finished beam's score is its log-probability / length ** length_penalty.
        logprobs: return the log-probabilities of this many best tokens at every step, and of the chosen one.
    """

    beam_width: Annotated[int, Range(1, MAX_LOGPROBS // 2)]
    max_tokens: Positive = 16
    ignore_eos: bool = False
    length_penalty: float = 1.0
    logprobs: Annotated[int, Range(0, MAX_LOGPROBS)] | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@takes_vllm_names(POOLING)
@dataclass(frozen=True)
class PoolingParams:
    """Settings of an embedding request.

    Attributes:
        dimensions: keep this many leading dimensions, and normalise after that (models trained for it:
            Kusupati et al. 2022, Matryoshka representation learning).
        truncate_prompt_tokens: as in `SamplingParams`.
    """

    dimensions: Positive | None = None
    truncate_prompt_tokens: Annotated[int, Range(-1)] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.truncate_prompt_tokens == 0:
            raise ConfigError("truncate_prompt_tokens=0: expected at least 1, or -1")


def _as_tuple(values: Any) -> Any:
    """A list, tuple, set or array -> a tuple; anything else is left for the check to name."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return tuple(values) if isinstance(values, (list, tuple, set, frozenset)) else values
