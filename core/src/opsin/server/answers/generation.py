"""One prompt through the engine: sampled, best of several, or by beam search."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from opsin.api import ProcessedPrompt
from opsin.config import BeamSearchParams, SamplingParams
from opsin.results import BeamSearchOutput, CompletionOutput, RequestMetrics, RequestOutput
from opsin.server.schema.responses import PromptTokensDetails, Usage
from opsin.server.serving import Serving


async def outputs(
    serving: Serving,
    prompt: ProcessedPrompt,
    params: SamplingParams,
    *,
    request_id: str,
    started: float,
    num_samples: int,
    beams: BeamSearchParams | None = None,
    finished_only: bool = False,
) -> AsyncGenerator[RequestOutput, None]:
    """A request's outputs, each with all there is so far.

    Args:
        serving: the model.
        prompt: ready for the engine.
        params: of sampling.
        request_id: unique.
        started: when the request arrived, in seconds of `time.monotonic`.
        num_samples: to give; the most probable ones where ``params.n`` is more.
        beams: search instead of sampling; there is only one output then.
        finished_only: give nothing but the last output.

    Raises:
        RequestError: the engine refuses the request.
    """
    engine, track = serving.engine, serving.metrics.track(started)
    if params.structured is not None:
        # Also makes the tokenizer's tables. The engine's thread, which all requests share, has it easy then.
        await engine.in_pool(engine.engine.grammars.compile, params.structured)
    finished = False
    try:
        if beams is not None:
            arrived = time.monotonic()
            found = await engine.beam_search(prompt, beams, request_id)
            output = _of_beams(prompt, found, request_id, arrived, num_samples)
            finished = True
            track.saw(output)
            yield output
            return
        choosing = num_samples < params.n
        generated = engine.generate(prompt, params, request_id, finished_only=finished_only or choosing)
        async with aclosing(generated) as stream:
            async for output in stream:
                finished = output.finished
                track.saw(output)
                if choosing:
                    output = replace(output, outputs=_best(output.outputs, num_samples))
                yield output
    finally:
        if not finished:
            track.ended_early(num_samples if beams is not None else params.n)


async def only_output(stream: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    """Of a stream that was asked for nothing but the last one."""
    async with aclosing(stream):
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
