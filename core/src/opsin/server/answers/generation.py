"""One prompt through the engine: sampled, best of several, or by beam search."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from opsin.api import ProcessedPrompt
from opsin.config import BeamSearchParams, SamplingParams
from opsin.results import BeamSearchOutput, CompletionOutput, RequestMetrics, RequestOutput
from opsin.server.schema.responses import PromptTokensDetails, Usage
from opsin.server.serving import Serving


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request on its way through the engine.

    Attributes:
        serving: the model.
        id: unique.
        model: the name to answer under.
        started: arrival of the request, in seconds of `time.monotonic`.
        params: of sampling.
        beams: search instead of sampling; there is only one output then.
        num_samples: to give for each prompt; the most probable ones where ``params.n`` is greater.
        created: seconds since 1970.
    """

    serving: Serving
    id: str
    model: str
    started: float
    params: SamplingParams
    beams: BeamSearchParams | None
    num_samples: int
    created: int = field(default_factory=lambda: int(time.time()))

    async def outputs(
        self, prompt: ProcessedPrompt, request_id: str, *, finished_only: bool = False
    ) -> AsyncGenerator[RequestOutput, None]:
        """A prompt's outputs, each with all there is so far; with ``finished_only`` only the last one.

        Raises:
            RequestError: the engine refuses the request.
        """
        engine, track, params = self.serving.engine, self.serving.metrics.track(self.started), self.params
        if params.structured is not None:
            # Builds the tokenizer's tables here, not on the engine's thread, which all requests share.
            await engine.in_pool(engine.frontend.grammars.compile, params.structured)
        finished = False
        try:
            if self.beams is not None:
                arrived = time.monotonic()
                found = await engine.beam_search(prompt, self.beams, request_id)
                output = _of_beams(prompt, found, request_id, arrived, self.num_samples)
                finished = True
                track.saw(output)
                yield output
                return
            choosing = self.num_samples < params.n
            generated = engine.generate(prompt, params, request_id, finished_only=finished_only or choosing)
            async with aclosing(generated) as stream:
                async for output in stream:
                    finished = output.finished
                    track.saw(output)
                    if choosing:
                        output = replace(output, outputs=_best(output.outputs, self.num_samples))
                    yield output
        finally:
            if not finished:
                track.ended_early(params.n if self.beams is None else self.num_samples)

    async def only_output(self, prompt: ProcessedPrompt, request_id: str) -> RequestOutput:
        """A prompt's last output."""
        async with aclosing(self.outputs(prompt, request_id, finished_only=True)) as stream:
            async for output in stream:
                return output
        raise AssertionError("a request ends with an output or an error")


def usage(*finished: RequestOutput) -> Usage:
    """Tokens of requests, so far."""
    prompt = sum(len(output.prompt_token_ids) for output in finished)
    generated = sum(len(sample.token_ids) for output in finished for sample in output.outputs)
    cached = sum(output.metrics.num_cached_tokens for output in finished if output.metrics is not None)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def _best(samples: Sequence[CompletionOutput], count: int) -> list[CompletionOutput]:
    ranked = sorted(samples, key=lambda sample: -(sample.cumulative_logprob or 0.0))
    return [replace(sample, index=index) for index, sample in enumerate(ranked[:count])]


def _of_beams(
    prompt: ProcessedPrompt, found: BeamSearchOutput, request_id: str, arrived: float, count: int
) -> RequestOutput:
    samples = [
        CompletionOutput(index, beam.text, beam.tokens, beam.cum_logprob, None, beam.finish_reason)
        for index, beam in enumerate(found.sequences[:count])
    ]
    times = RequestMetrics(arrived, finished_time=time.monotonic())
    return RequestOutput(request_id, prompt.text, list(prompt.token_ids), None, samples, True, times)
