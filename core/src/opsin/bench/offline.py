"""A model in this process: how many requests it answers per second, and how quickly a batch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opsin.bench.prompts import Conversation, Prompts, conversations
from opsin.bench.settings import LatencySettings, PromptSettings, ThroughputSettings
from opsin.bench.summary import Results, Timing
from opsin.params import SamplingParams

if TYPE_CHECKING:
    from opsin.llm import LLM
    from opsin.results import RequestOutput


def throughput(llm: LLM, load: ThroughputSettings, requests: PromptSettings, seed: int) -> Results:
    """Give all requests at once."""
    prompts = _prompts(llm, requests, seed)
    params = sampling(requests)
    warm_ups = conversations(prompts, range(load.num_prompts, load.num_prompts + load.num_warmups))
    if warm_ups:
        llm.chat(warm_ups, params, use_tqdm=False)
    asked = conversations(prompts, range(load.num_prompts))
    started = time.monotonic()
    outputs = llm.chat(asked, params, on_error="return")
    duration = time.monotonic() - started
    return Results(
        kind="throughput",
        model=llm.engine.config.model,
        settings={},
        duration=duration,
        timings=[_timing(output, started) for output in outputs if output.error is None],
        failures=[str(output.error) for output in outputs if output.error is not None],
        more=_shared(outputs),
    )


def latency(llm: LLM, load: LatencySettings, requests: PromptSettings, seed: int) -> Results:
    """Give one batch after the other; a batch of one is watched token by token."""
    from tqdm import tqdm

    prompts = _prompts(llm, requests, seed)
    params = sampling(requests)
    batches: list[float] = []
    timings: list[Timing] = []
    started = time.monotonic()
    for number in tqdm(range(load.num_iters_warmup + load.num_iters), desc="batches", unit="batch"):
        first = number * load.batch_size
        asked = conversations(prompts, range(first, first + load.batch_size))
        if number == load.num_iters_warmup:
            started = time.monotonic()
        begun = time.monotonic()
        if load.batch_size == 1:
            found = [_watched(llm, asked[0], params, started)]
        else:
            outputs = llm.chat(asked, params, use_tqdm=False)
            found = [_timing(output, started) for output in outputs]
        if number >= load.num_iters_warmup:
            batches.append(time.monotonic() - begun)
            timings += found
    return Results(
        kind="latency",
        model=llm.engine.config.model,
        settings={},
        duration=sum(batches),
        timings=timings,
        times={"batch": batches},
    )


def sampling(requests: PromptSettings) -> SamplingParams:
    """Parameters of the answers."""
    return SamplingParams(
        temperature=requests.temperature, max_tokens=requests.output_len, ignore_eos=requests.ignore_eos
    )


def _prompts(llm: LLM, requests: PromptSettings, seed: int) -> Prompts:
    tokenizer = llm.get_tokenizer()
    return Prompts(requests, seed, lambda text: len(tokenizer.encode(text, add_special_tokens=False)))


def _watched(llm: LLM, conversation: Conversation, params: SamplingParams, started: float) -> Timing:
    begun = time.monotonic()
    times: list[float] = []
    for output in llm.stream_chat(conversation, params):
        now = time.monotonic()
        times += [now] * (len(output.outputs[0].token_ids) - len(times))
    return Timing(
        arrival=begun - started,
        first_token=times[0] - begun if times else None,
        gaps=[after - before for before, after in itertools.pairwise(times)],
        total=time.monotonic() - begun,
        num_prompt_tokens=len(output.prompt_token_ids),
        num_output_tokens=len(times),
    )


def _timing(output: RequestOutput, started: float) -> Timing:
    """From the engine's own record; it has no times between tokens."""
    seen = output.metrics
    assert seen is not None, "a finished request has a record"
    assert seen.finished_time is not None, "it is finished"
    first = None if seen.first_token_time is None else seen.first_token_time - seen.arrival_time
    return Timing(
        arrival=seen.arrival_time - started,
        first_token=first,
        gaps=(),
        total=seen.finished_time - seen.arrival_time,
        num_prompt_tokens=len(output.prompt_token_ids),
        num_output_tokens=sum(len(answer.token_ids) for answer in output.outputs),
    )


def _shared(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    cached = sum(output.metrics.num_cached_tokens for output in outputs if output.metrics is not None)
    return {"shared_prompt_tokens": cached}
