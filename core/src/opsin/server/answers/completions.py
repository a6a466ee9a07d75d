"""Completions: `CompletionRequest` in, `Completion`s out. Knows nothing of HTTP."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from opsin.results import CompletionOutput, RequestOutput
from opsin.server.answers.generation import Job, Sent, streamed, usage
from opsin.server.answers.logprobs import Entries, completion_logprobs, prompt_logprobs
from opsin.server.answers.sampling import decoding
from opsin.server.http.errors import bad_request
from opsin.server.schema.prompts import CompletionRequest
from opsin.server.schema.responses import Completion, CompletionChoice
from opsin.server.serving import Serving

_DEFAULT_MAX_TOKENS = 16
"""OpenAI's for completions."""


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
        finished = await job.finished()
        completion = job.chunk(
            [
                job.choice(number, output, sample)
                for number, output in enumerate(finished)
                for sample in output.outputs
            ]
        )
        completion.usage = usage(*finished)
        if request.max_tokens == 0:
            completion.usage.total_tokens -= completion.usage.completion_tokens
            completion.usage.completion_tokens = 0
        return completion

    def stream(self, request: CompletionRequest) -> AsyncGenerator[Completion, None]:
        """The answer as it is made. Whatever is wrong with the request is raised before the first chunk."""
        return streamed(lambda: self._prepare(request))

    async def _prepare(self, request: CompletionRequest) -> _Completion:
        serving, started = self._serving, time.monotonic()
        model = serving.check(request.model, task="generate")
        prompts = serving.inputs(request.prompt, "prompt")
        if request.mm_processor_kwargs:
            raise bad_request("completions take no media; use /v1/chat/completions", "mm_processor_kwargs")
        params, beams = decoding(
            request,
            serving,
            # max_tokens=0 runs as one token, which is discarded.
            max_tokens=_DEFAULT_MAX_TOKENS if request.max_tokens is None else max(request.max_tokens, 1),
            logprobs=request.logprobs,
        )
        if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
            params = replace(params, prompt_logprobs=request.logprobs)
        return _Completion(
            serving=serving,
            request=request,
            prompts=await serving.plain_prompts(
                prompts, truncate=request.truncate_prompt_tokens, cache_salt=request.cache_salt
            ),
            id=f"cmpl-{uuid.uuid4().hex}",
            model=model,
            started=started,
            params=params,
            beams=beams,
        )


@dataclass
class _Sent(Sent):
    offset: int = 0
    """Characters of the tokens whose log-probabilities were sent."""


@dataclass(frozen=True, kw_only=True)
class _Completion(Job[CompletionChoice, Completion]):
    """Prompts ready for the engine."""

    request: CompletionRequest
    sent: Mapping[tuple[int, int], _Sent] = field(default_factory=lambda: defaultdict(_Sent))

    @cached_property
    def echoes(self) -> list[str]:
        """What each prompt's choices begin with."""
        if not self.request.echo:
            return [""] * len(self.prompts)
        return [
            self._decode(prompt.token_ids) if prompt.text is None else prompt.text for prompt in self.prompts
        ]

    def chunk(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self.answer_id,
            object="text_completion",
            created=self.created,
            model=self.model,
            system_fingerprint=self.serving.info.fingerprint,
            choices=choices,
        )

    def new_choices(
        self, number: int, output: RequestOutput, sample: CompletionOutput
    ) -> Iterator[CompletionChoice]:
        sent = self.sent[number, sample.index]
        if sent.ended:
            return
        first = not sent.begun
        echo = self.echoes[number] if first else ""
        ids = sent.new_ids(sample) if self.request.return_token_ids else []
        text, tokens = sent.advance(sample)
        logprobs = None
        if self.request.logprobs is not None:
            before, unpredicted = self._scored_prompt(output) if first else ((), "")
            if before or tokens:
                logprobs = completion_logprobs(
                    [*before, *tokens], self.request.logprobs, sent.offset, unpredicted=unpredicted
                )
                sent.offset += sum(map(len, logprobs.tokens))
        if not (echo or text or logprobs or ids or sample.finish_reason):
            return
        choice = CompletionChoice(
            index=number * self.num_samples + sample.index,
            text=echo + text,
            logprobs=logprobs,
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
        )
        if ids:
            choice.token_ids = ids
        if ids and first:
            choice.prompt_token_ids = list(self.prompts[number].token_ids)
        yield choice

    def choice(self, number: int, output: RequestOutput, sample: CompletionOutput) -> CompletionChoice:
        """A finished sample."""
        request, echo = self.request, self.echoes[number]
        if request.max_tokens == 0:
            sample = replace(
                sample,
                text="",
                token_ids=[],
                logprobs=None if sample.logprobs is None else [],
                finish_reason="length",
                stop_reason=None,
            )
        logprobs = None
        if request.logprobs is not None and sample.logprobs is not None:
            before, unpredicted = self._scored_prompt(output)
            logprobs = completion_logprobs(
                [*before, *sample.logprobs], request.logprobs, unpredicted=unpredicted
            )
        choice = CompletionChoice(
            index=number * self.num_samples + sample.index,
            text=echo + sample.text,
            logprobs=logprobs,
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
        )
        if request.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        if request.return_token_ids:
            choice.prompt_token_ids = list(output.prompt_token_ids)
            choice.token_ids = list(sample.token_ids)
        return choice

    def _scored_prompt(self, output: RequestOutput) -> tuple[Sequence[Entries | None], str]:
        """With `echo` the prompt's log-probabilities, and its first token's text: nothing predicts that."""
        if not self.request.echo or not output.prompt_logprobs:
            return (), ""
        return output.prompt_logprobs, self._decode(output.prompt_token_ids[:1])

    def _decode(self, ids: Sequence[int]) -> str:
        return self.serving.frontend.tokenizer.decode(list(ids), skip_special_tokens=False)
