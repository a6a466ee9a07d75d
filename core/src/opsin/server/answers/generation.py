"""Prompts through the engine: sampled, best of several, or by beam search; whole or as a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from opsin.api import ProcessedPrompt
from opsin.fetch.gather import all_of
from opsin.params import BeamSearchParams, SamplingParams
from opsin.results import CompletionOutput, Logprob, Output, RequestMetrics, RequestOutput
from opsin.server.http.gather import merged
from opsin.server.metrics import Progress
from opsin.server.schema.responses import (
    ChatChunk,
    ChatChunkChoice,
    Completion,
    CompletionChoice,
    PromptTokensDetails,
    Usage,
)
from opsin.server.schema.sampling import SamplingRequest
from opsin.server.serving import Serving

ChoiceT = TypeVar("ChoiceT", bound="ChatChunkChoice | CompletionChoice")
ChunkT = TypeVar("ChunkT", bound="ChatChunk | Completion")


@dataclass
class Sent:
    """What has been sent of one sample."""

    num_chars: int = 0
    num_tokens: int = 0
    num_ids: int = 0
    begun: bool = False
    ended: bool = False

    def advance(self, sample: CompletionOutput) -> tuple[str, Sequence[Mapping[int, Logprob]]]:
        """The new text and log-probabilities; they count as sent from now on."""
        logprobs = sample.logprobs or ()
        new = sample.text[self.num_chars :], logprobs[self.num_tokens :]
        self.num_chars, self.num_tokens = len(sample.text), len(logprobs)
        self.begun, self.ended = True, sample.finish_reason is not None
        return new

    def new_ids(self, sample: CompletionOutput) -> list[int]:
        """The new token ids; they count as sent from now on."""
        new = list(sample.token_ids[self.num_ids :])
        self.num_ids = len(sample.token_ids)
        return new


@dataclass(frozen=True, kw_only=True)
class Job(ABC, Generic[ChoiceT, ChunkT]):
    """A request on its way through the engine.

    Attributes:
        serving: the model.
        request: what was asked for.
        prompts: what to generate from, at least one.
        id: unique.
        model: the name to answer under.
        started: arrival of the request, in seconds of `time.monotonic`.
        params: how to sample; ``params.n`` is greater than `num_samples` where the most probable are chosen.
        beams: search instead of sampling; there is only one output then.
        created: seconds since 1970.
    """

    serving: Serving
    request: SamplingRequest
    prompts: Sequence[ProcessedPrompt]
    id: str
    model: str
    started: float
    params: SamplingParams
    beams: BeamSearchParams | None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_samples(self) -> int:
        """Samples to give for each prompt."""
        return self.request.n or 1

    @property
    def answer_id(self) -> str:
        """The answer's id: with the request's own name for it, if it has one, as vLLM's."""
        given = self.request.request_id
        return self.id if given is None else f"{self.id.partition('-')[0]}-{given}"

    @abstractmethod
    def new_choices(self, number: int, output: RequestOutput, sample: CompletionOutput) -> Iterable[ChoiceT]:
        """What is new of a sample of prompt ``number``; it counts as sent from now on."""

    @abstractmethod
    def chunk(self, choices: list[ChoiceT]) -> ChunkT:
        """An event of a stream, its usage unset."""

    async def finished(self) -> list[RequestOutput]:
        """The last output of each prompt.

        Raises:
            RequestError: the engine refuses the request.
        """
        return await all_of(self._last(number) for number in range(len(self.prompts)))

    async def _last(self, number: int) -> RequestOutput:
        async with aclosing(self.outputs(number, finished_only=True)) as stream:
            async for output in stream:
                return output
        raise AssertionError("a request ends with an output or an error")

    async def outputs(
        self, number: int, *, finished_only: bool = False
    ) -> AsyncGenerator[RequestOutput, None]:
        """A prompt's outputs, each with all there is so far; with ``finished_only`` only the last one."""
        engine, metrics, params = self.serving.engine, self.serving.metrics, self.params
        prompt, request_id = self.prompts[number], f"{self.id}-{number}"
        progress, finished = Progress(self.started), False
        try:
            if self.beams is not None:
                output = await self._search(prompt, self.beams, request_id)
                finished = True
                metrics.advanced(progress, output)
                yield output
                return
            choosing = self.num_samples < params.n
            generated = engine.generate(prompt, params, request_id, finished_only=finished_only or choosing)
            async with aclosing(generated) as stream:
                async for output in stream:
                    finished = output.finished
                    metrics.advanced(progress, output)
                    if choosing:
                        output = replace(output, outputs=_best(output.outputs, self.num_samples))
                    yield output
        finally:
            if not finished:  # the client has left, or the request has failed on the way
                metrics.ended("abort", params.n if self.beams is None else self.num_samples)

    async def _search(
        self, prompt: ProcessedPrompt, beams: BeamSearchParams, request_id: str
    ) -> RequestOutput:
        arrived = time.monotonic()
        found = await self.serving.engine.beam_search(prompt, beams, request_id)
        samples = [
            CompletionOutput(
                index, beam.text, beam.tokens, beam.cum_logprob, beam.logprobs, beam.finish_reason
            )
            for index, beam in enumerate(found.sequences[: self.num_samples])
        ]
        times = RequestMetrics(arrived, finished_time=time.monotonic())
        return RequestOutput(request_id, prompt.text, list(prompt.token_ids), None, samples, True, times)


async def streamed(
    prepare: Callable[[], Awaitable[Job[ChoiceT, ChunkT]]],
) -> AsyncGenerator[ChunkT, None]:
    """The answer of a job as it is made; whatever ``prepare`` raises comes before the first chunk."""
    job = await prepare()
    options = job.request.stream_options

    def chunk(choices: list[ChoiceT], used: Usage | None) -> ChunkT:
        made = job.chunk(choices)
        if options is not None:
            made.usage = used
        return made

    latest: dict[int, RequestOutput] = {}
    streams = [job.outputs(number) for number in range(len(job.prompts))]
    async with aclosing(merged(streams)) as together:
        async for number, output in together:
            latest[number] = output
            so_far = usage(output) if options is not None and options.continuous_usage_stats else None
            for sample in output.outputs:
                for choice in job.new_choices(number, output, sample):
                    yield chunk([choice], so_far)
    if options is not None and options.include_usage:
        yield chunk([], usage(*latest.values()))


def usage(*outputs: Output) -> Usage:
    """Tokens of requests, so far."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    answers = [output for output in outputs if isinstance(output, RequestOutput)]
    generated = sum(len(sample.token_ids) for answer in answers for sample in answer.outputs)
    cached = sum(output.metrics.num_cached_tokens for output in outputs if output.metrics is not None)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def _best(samples: Sequence[CompletionOutput], count: int) -> list[CompletionOutput]:
    ranked = sorted(samples, key=lambda sample: -(sample.cumulative_logprob or 0.0))
    return [replace(sample, index=index) for index, sample in enumerate(ranked[:count])]
