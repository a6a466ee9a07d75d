"""Completions: `CompletionRequest` in, `Completion`s out. Knows nothing of HTTP."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cached_property

from opsin.api import ProcessedPrompt
from opsin.results import CompletionOutput, RequestOutput
from opsin.server.answers.constraint import constraint
from opsin.server.answers.generation import Job, usage
from opsin.server.answers.logprobs import completion_logprobs, prompt_logprobs
from opsin.server.answers.sampling import beam_params, sampling_params
from opsin.server.http.errors import bad_request
from opsin.server.http.gather import all_of, merged
from opsin.server.schema.completion import CompletionRequest
from opsin.server.schema.prompts import listed
from opsin.server.schema.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from opsin.server.serving import Serving

_DEFAULT_MAX_TOKENS = 16
"""OpenAI's for completions."""


@dataclass(frozen=True, kw_only=True)
class _Completion(Job):
    """Prompts ready for the engine."""

    request: CompletionRequest
    prompts: Sequence[ProcessedPrompt]

    @cached_property
    def echoes(self) -> list[str]:
        """What each prompt's choices begin with."""
        if not self.request.echo:
            return [""] * len(self.prompts)
        tokenizer = self.serving.frontend.tokenizer
        return [
            prompt.text
            if prompt.text is not None
            else tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False)
            for prompt in self.prompts
        ]


class Completions:
    """Completes plain prompts with one model."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def create(self, request: CompletionRequest) -> Completion:
        """The whole answer.

        Raises:
            ApiError, RequestError: the request cannot be answered.
        """
        job = await self._prepare(request)
        finished = await all_of(
            job.only_output(prompt, f"{job.id}-{number}") for number, prompt in enumerate(job.prompts)
        )
        completion = Completion(
            id=job.id,
            object="text_completion",
            created=job.created,
            model=job.model,
            choices=[
                _choice(job, number, output, sample)
                for number, output in enumerate(finished)
                for sample in output.outputs
            ],
        )
        completion.usage = usage(*finished)
        if request.max_tokens == 0:
            completion.usage.total_tokens -= completion.usage.completion_tokens
            completion.usage.completion_tokens = 0
        return completion

    async def stream(self, request: CompletionRequest) -> AsyncGenerator[Completion, None]:
        """The answer as it is made. Whatever is wrong with the request is raised before the first chunk.

        Raises:
            ApiError, RequestError: the request cannot be answered.
        """
        job = await self._prepare(request)
        options = request.stream_options
        sent = [[_Sent() for _ in range(job.num_samples)] for _ in job.prompts]
        latest: dict[int, RequestOutput] = {}
        streams = [job.outputs(prompt, f"{job.id}-{number}") for number, prompt in enumerate(job.prompts)]
        async with aclosing(merged(streams)) as together:
            async for number, output in together:
                latest[number] = output
                in_chunks = usage(output) if options is not None and options.continuous_usage_stats else None
                for sample in output.outputs:
                    choice = _delta(job, number, sample, sent[number][sample.index])
                    if choice is not None:
                        yield _chunk(job, [choice], in_chunks)
        if options is not None and options.include_usage:
            yield _chunk(job, [], usage(*latest.values()))

    async def _prepare(self, request: CompletionRequest) -> _Completion:
        serving, started = self._serving, time.monotonic()
        model = serving.check(request.model, task="generate")
        prompts = listed(request.prompt)
        most = serving.settings.limits.max_inputs
        if len(prompts) > most:
            raise bad_request(f"at most {most} prompts are accepted (--max-inputs)", "prompt")
        if request.mm_processor_kwargs:
            raise bad_request("completions take no media; use /v1/chat/completions", "mm_processor_kwargs")
        params = sampling_params(
            request,
            serving,
            # max_tokens=0 runs as one token, which is discarded.
            max_tokens=_DEFAULT_MAX_TOKENS if request.max_tokens is None else max(request.max_tokens, 1),
            logprobs=request.logprobs,
            structured=constraint(request),
        )
        if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
            params = replace(params, prompt_logprobs=request.logprobs)
        beams = beam_params(request, max_tokens=params.max_tokens, structured=params.structured)
        if beams is not None and request.logprobs is not None:
            raise bad_request("use_beam_search gives no log-probabilities", "logprobs")
        processed = await all_of(
            serving.plain_prompt(
                prompt, truncate=request.truncate_prompt_tokens, cache_salt=request.cache_salt
            )
            for prompt in prompts
        )
        return _Completion(
            serving=serving,
            id=f"cmpl-{uuid.uuid4().hex}",
            model=model,
            started=started,
            params=params,
            beams=beams,
            num_samples=request.n or 1,
            request=request,
            prompts=processed,
        )


@dataclass
class _Sent:
    """What of one sample has been sent."""

    num_chars: int = 0
    num_tokens: int = 0
    offset: int = 0
    begun: bool = False
    ended: bool = False


def _choice(
    job: _Completion, number: int, output: RequestOutput, sample: CompletionOutput
) -> CompletionChoice:
    request, text = job.request, job.echoes[number]
    is_empty = request.max_tokens == 0
    logprobs = None
    if request.logprobs is not None and sample.logprobs is not None:
        tokens = [] if is_empty else list(sample.logprobs)
        if request.echo:
            tokens = [*(output.prompt_logprobs or ()), *tokens]
        first = output.prompt_token_ids[0]
        logprobs = completion_logprobs(
            tokens,
            [_token_text(job, entries, first) for entries in tokens],
            request.logprobs,
            0 if request.echo else len(text),
        )
    choice = CompletionChoice(
        index=number * job.num_samples + sample.index,
        text=text + ("" if is_empty else sample.text),
        logprobs=logprobs,
        finish_reason="length" if is_empty else sample.finish_reason,
        stop_reason=None if is_empty else sample.stop_reason,
    )
    if request.prompt_logprobs is not None:
        choice.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
    return choice


def _delta(job: _Completion, number: int, sample: CompletionOutput, sent: _Sent) -> CompletionChoice | None:
    if sent.ended:
        return None
    text = sample.text[sent.num_chars :]
    sent.num_chars = len(sample.text)
    if not sent.begun:
        sent.begun = True
        text = job.echoes[number] + text
    logprobs: CompletionLogprobs | None = None
    if job.request.logprobs is not None and sample.logprobs is not None:
        new = sample.logprobs[sent.num_tokens :]
        sent.num_tokens = len(sample.logprobs)
        if new:
            texts = [_token_text(job, entries, 0) for entries in new]
            logprobs = completion_logprobs(new, texts, job.request.logprobs, sent.offset)
            sent.offset += sum(map(len, texts))
    if sample.finish_reason is not None:
        sent.ended = True
    elif not text and logprobs is None:
        return None
    return CompletionChoice(
        index=number * job.num_samples + sample.index,
        text=text,
        logprobs=logprobs,
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
    )


def _chunk(job: _Completion, choices: list[CompletionChoice], used: Usage | None) -> Completion:
    chunk = Completion(
        id=job.id, object="text_completion", created=job.created, model=job.model, choices=choices
    )
    if job.request.stream_options is not None:
        chunk.usage = used
    return chunk


def _token_text(job: _Completion, entries: object, first: int) -> str:
    """Text of a token; ``first`` is the prompt's first one, which nothing predicts."""
    if isinstance(entries, dict) and entries:
        return next(iter(entries.values())).decoded_token or ""
    return job.serving.frontend.tokenizer.decode([first], skip_special_tokens=False)
