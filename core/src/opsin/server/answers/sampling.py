"""A request's fields -> `SamplingParams` and `BeamSearchParams`, within the server's limits."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from opsin.errors import ConfigError
from opsin.params import BeamSearchParams, SamplingParams, StructuredOutput
from opsin.server.http.errors import bad_request
from opsin.server.schema.sampling import SamplingRequest
from opsin.server.serving import Serving

_SHARED = {f.name for f in fields(SamplingParams)} & SamplingRequest.model_fields.keys()
"""Fields with one name and meaning in requests and `SamplingParams`; the model's defaults where absent."""


def decoding(
    request: SamplingRequest,
    serving: Serving,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    calls: StructuredOutput | None = None,
) -> tuple[SamplingParams, BeamSearchParams | None]:
    """What the request asks for, over the checkpoint's generation_config; and its beam search, if any.

    Args:
        request: checked by its model.
        serving: gives defaults and limits.
        max_tokens: None: to the end of the context.
        logprobs: alternatives per token; None: no log-probabilities.
        calls: constrains the answer to calls of tools.

    Raises:
        ApiError: a limit is exceeded, or two settings do not go together.
    """
    structured = _constraint(request)
    if calls is not None and structured is not None:
        raise bad_request("tool_choice already constrains the answer; leave out the other constraint")
    structured = calls or structured
    _check_limits(request, serving, logprobs)
    num_samples, best_of = request.n or 1, request.best_of or 1
    changes = request.model_dump(include=_SHARED, exclude_none=True) | {
        "n": max(best_of, num_samples),
        "max_tokens": max_tokens,
        # best_of chooses by log-probability
        "logprobs": 0 if logprobs is None and best_of > num_samples else logprobs,
        "structured": structured,
    }
    try:
        params = serving.info.default_params(**changes)
    except ConfigError as error:
        raise bad_request(str(error)) from None
    if not request.use_beam_search:
        return params, None
    restricts = structured or request.stop or request.bad_words or request.allowed_token_ids
    if restricts or request.prompt_logprobs is not None:
        raise bad_request(
            "use_beam_search goes without constraints, stop strings and prompt_logprobs", "use_beam_search"
        )
    try:
        beams = BeamSearchParams(
            beam_width=params.n,
            max_tokens=max_tokens if max_tokens is not None else 2**31,
            ignore_eos=bool(request.ignore_eos),
            length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
            logprobs=logprobs,
        )
    except ConfigError as error:
        raise bad_request(str(error), "use_beam_search") from None
    return params, beams


def _constraint(request: SamplingRequest) -> StructuredOutput | None:
    """What the answer's text has to be, None if it is free.

    Raises:
        ApiError: two constraints are asked for, or one is empty.
    """
    found: dict[str, dict[str, Any]] = {}
    wanted = request.response_format
    if wanted is not None and wanted.json_schema is not None:
        found["response_format"] = {"json": wanted.json_schema.schema_}
    elif wanted is not None and wanted.type == "json_object":
        found["response_format"] = {"json_object": True}
    for kind in ("json", "regex", "choice", "grammar"):
        value = getattr(request, f"guided_{kind}")
        if value is not None:
            found[f"guided_{kind}"] = {kind: value}
    if request.structured_outputs is not None:
        found["structured_outputs"] = request.structured_outputs.model_dump(by_alias=True, exclude_none=True)
    try:
        constraints = [StructuredOutput(**given) for given in found.values()]
    except ConfigError as error:
        raise bad_request(str(error)) from None
    if len(constraints) > 1:
        raise bad_request(f"{' and '.join(found)} constrain the same answer; set only one of them")
    return constraints[0] if constraints else None


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
    size = serving.info.vocab_size
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        if any(not 0 <= int(token) < size for token in getattr(request, name) or ()):
            raise bad_request(f"{name}: a token id is out of vocabulary; expected 0 to {size - 1}", name)
