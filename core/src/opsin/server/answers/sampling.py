"""A request's sampling fields -> `SamplingParams`, within the server's limits."""

from __future__ import annotations

from typing import Any

from opsin.config import BeamSearchParams, SamplingParams, StructuredOutput
from opsin.errors import ConfigError
from opsin.server.http.errors import bad_request
from opsin.server.schema.sampling import SamplingRequest
from opsin.server.serving import Serving

_PLAIN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "prompt_logprobs",
    "skip_special_tokens",
    "priority",
)
"""Fields with the name and meaning they have in `SamplingParams`; the model's defaults where absent."""


def sampling_params(
    request: SamplingRequest,
    serving: Serving,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    structured: StructuredOutput | None,
) -> SamplingParams:
    """What the request asks for, over the checkpoint's generation_config.

    Args:
        request: checked by its model.
        serving: gives defaults and limits.
        max_tokens: None: to the end of the context.
        logprobs: alternatives per token; None: no log-probabilities.
        structured: constrains the answer.

    Raises:
        ApiError: a limit is exceeded, or two settings do not go together.
    """
    _check_limits(request, serving, logprobs)
    changes: dict[str, Any] = {
        name: value for name in _PLAIN if (value := getattr(request, name)) is not None
    }
    best_of = request.best_of or 1
    choosing = best_of > (request.n or 1)
    if request.logit_bias is not None:
        changes["logit_bias"] = {int(token): bias for token, bias in request.logit_bias.items()}
    if logprobs is None and choosing:
        logprobs = 0  # the choice is by log-probability
    changes |= {
        "n": max(best_of, request.n or 1),
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "structured": structured,
    }
    try:
        return serving.info.default_params(**changes)
    except ConfigError as error:
        raise bad_request(str(error)) from None


def beam_params(
    request: SamplingRequest, *, max_tokens: int | None, structured: StructuredOutput | None
) -> BeamSearchParams | None:
    """Settings of a beam search, None if none is asked for.

    Raises:
        ApiError: something cannot be had with beam search.
    """
    if not request.use_beam_search:
        return None
    if structured is not None or request.prompt_logprobs is not None or request.stop:
        raise bad_request(
            "use_beam_search goes without constraints, stop strings and log-probabilities", "use_beam_search"
        )
    try:
        return BeamSearchParams(
            beam_width=max(request.best_of or 1, request.n or 1),
            max_tokens=max_tokens if max_tokens is not None else 2**31,
            ignore_eos=bool(request.ignore_eos),
            length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
        )
    except ConfigError as error:
        raise bad_request(str(error), "use_beam_search") from None


def _check_limits(request: SamplingRequest, serving: Serving, logprobs: int | None) -> None:
    limits = serving.settings.limits
    if request.priority and serving.info.config.scheduling_policy == "fcfs":
        raise bad_request(
            "priority: this server answers first come, first served (--scheduling-policy priority)",
            "priority",
        )
    for name, value in (("n", request.n), ("best_of", request.best_of)):
        if value is not None and value > limits.max_n:
            raise bad_request(f"{name}: at most {limits.max_n} samples are accepted (--max-n)", name)
    if isinstance(request.stop, list) and len(request.stop) > limits.max_stop:
        raise bad_request(f"stop: at most {limits.max_stop} strings are accepted (--max-stop)", "stop")
    for name, value in (("logprobs", logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        if value is not None and value > limits.max_logprobs:
            raise bad_request(f"{name}: at most {limits.max_logprobs} are given (--max-logprobs)", name)
    ids = {
        "stop_token_ids": request.stop_token_ids or (),
        "logit_bias": [int(token) for token in request.logit_bias or ()],
    }
    for name, tokens in ids.items():
        if any(not 0 <= token < serving.info.vocab_size for token in tokens):
            raise bad_request(
                f"{name}: a token id is out of vocabulary; expected 0 to {serving.info.vocab_size - 1}", name
            )
