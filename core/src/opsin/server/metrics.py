"""Prometheus metrics. Names are vLLM's with the prefix ``opsin:``."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from opsin.results import EngineStats, RequestOutput

PREFIX = "opsin:"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass
class Progress:
    """How far a request has come.

    Attributes:
        started: arrival, in seconds of `time.monotonic`.
        last: when its latest tokens came; None before the first.
        num_tokens: tokens generated, of all samples.
    """

    started: float
    last: float | None = None
    num_tokens: int = 0


class Metrics(Collector):
    """Counts what happens. Belongs to the event loop."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._stats: EngineStats | None = None
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        histogram = partial(_Histogram, self._registry, model_name)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}{name}", about, labels, registry=self._registry)

        self._time_to_first_token = histogram(
            "time_to_first_token_seconds", "From the request's arrival, preprocessing included."
        )
        self._inter_token = histogram("inter_token_latency_seconds", "Between two tokens of one sample.")
        self._end_to_end = histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue = histogram("request_queue_time_seconds", "Waiting for the engine.")
        self._preprocessing = histogram(
            "request_preprocessing_time_seconds", "Fetching, decoding, rendering and tokenizing."
        )
        of_model = "model_name"
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens, pictures expanded.", of_model).labels(
            model_name
        )
        self._generated_tokens = counter("generation_tokens", "Generated tokens.", of_model).labels(
            model_name
        )
        self._ended = counter("request_success", "Samples that ended.", of_model, "finished_reason")
        self._http = counter("http_requests", "HTTP requests answered.", "method", "handler", "status")

    def text(self, stats: EngineStats | None) -> bytes:
        """Prometheus' text format; ``stats`` is None while there is no engine."""
        self._stats = stats
        return generate_latest(self._registry)

    def http_text(self, others: Collector) -> bytes:
        """Prometheus' text format of the HTTP requests answered here, and of others' metrics."""
        registry = CollectorRegistry()
        registry.register(self._http)
        registry.register(others)
        return generate_latest(registry)

    def answered(self, method: str, route: str, status: int) -> None:
        """An HTTP request was answered."""
        self._http.labels(method, route, str(status)).inc()

    def preprocessed(self, seconds: float) -> None:
        """A prompt is ready for the engine."""
        self._preprocessing.observe(seconds)

    def embedded(self, started: float, num_tokens: int) -> None:
        """An embedding is there; ``started`` is of `time.monotonic`."""
        self._prompt_tokens.inc(num_tokens)
        self._end_to_end.observe(time.monotonic() - started)
        self.ended("stop")

    def advanced(self, progress: Progress, output: RequestOutput) -> None:
        """A request has come as far as ``output``; also updates ``progress``."""
        now, times = time.monotonic(), output.metrics
        num_tokens = sum(len(sample.token_ids) for sample in output.outputs)
        new = num_tokens - progress.num_tokens
        gaps = new
        if progress.last is None and new:
            # The engine knows the first token's time also where only the whole answer is seen.
            first = times.first_token_time if times is not None else None
            progress.last = now if first is None else first
            self._prompt_tokens.inc(len(output.prompt_token_ids))
            self._time_to_first_token.observe(progress.last - progress.started)
            if times is not None and times.first_scheduled_time is not None:
                self._queue.observe(times.first_scheduled_time - times.arrival_time)
            gaps = 0 if first is None else new - len(output.outputs)
        if progress.last is not None and gaps > 0:
            self._inter_token.observe((now - progress.last) * len(output.outputs) / gaps, gaps)
        if new:
            self._generated_tokens.inc(new)
            progress.last, progress.num_tokens = now, num_tokens
        if output.finished:
            self._end_to_end.observe(now - progress.started)
            for sample in output.outputs:
                self.ended(sample.finish_reason or "abort")

    def ended(self, reason: str, num_samples: int = 1) -> None:
        """Samples have ended, for the same reason."""
        self._ended.labels(self._model_name, reason).inc(num_samples)

    def collect(self) -> Iterator[Metric]:
        """The engine's gauges and counters at the moment of the question."""
        stats = self._stats
        if stats is None:
            return

        def family(
            kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, about: str, value: float
        ) -> Metric:
            made = kind(f"{PREFIX}{name}", about, labels=["model_name"])
            made.add_metric([self._model_name], value)
            return made

        gauge, counter = partial(family, GaugeMetricFamily), partial(family, CounterMetricFamily)
        yield gauge("num_requests_running", "Sequences being computed.", stats.num_running)
        yield gauge("num_requests_waiting", "Sequences waiting.", stats.num_waiting)
        used = stats.kv_blocks_used / stats.kv_blocks
        yield gauge("kv_cache_usage_perc", "KV blocks in use, 1 for all.", used)
        yield gauge("encoder_cache_bytes", "Encoder outputs held.", stats.encoder_cache_bytes)
        yield gauge("mm_cache_bytes", "Preprocessed media held.", stats.media_cache_bytes)
        yield counter("prefix_cache_queries", "Blocks looked up.", stats.prefix_queries)
        yield counter("prefix_cache_hits", "Blocks found.", stats.prefix_hits)
        yield counter("encoder_cache_queries", "Media needed encoded.", stats.encoder_queries)
        yield counter("encoder_cache_hits", "Media found encoded.", stats.encoder_hits)
        yield counter("mm_cache_queries", "Media needed preprocessed.", stats.media_queries)
        yield counter("mm_cache_hits", "Media found preprocessed.", stats.media_hits)
        yield counter("num_preemptions", "Sequences pushed out.", stats.num_preemptions)
        yield counter("spec_decode_num_drafts", "Guesses verified.", stats.spec_decode_num_drafts)
        yield counter(
            "spec_decode_num_draft_tokens", "Tokens of these guesses.", stats.spec_decode_num_draft_tokens
        )
        yield counter(
            "spec_decode_num_accepted_tokens",
            "Of these, tokens that were right.",
            stats.spec_decode_num_accepted_tokens,
        )
        by_position = CounterMetricFamily(
            f"{PREFIX}spec_decode_num_accepted_tokens_per_pos",
            "The same by their place in the guess, from 0.",
            labels=["model_name", "position"],
        )
        for position, count in enumerate(stats.spec_decode_num_accepted_tokens_per_pos):
            by_position.add_metric([self._model_name, str(position)], count)
        yield by_position
        forms = GaugeMetricFamily(f"{PREFIX}weight_forms", "Linear layers.", labels=["model_name", "form"])
        for form, count in stats.weight_forms.items():
            forms.add_metric([self._model_name, form], count)
        yield forms


class _Histogram(Collector):
    """Times in seconds; belongs to one thread. It is observed once per token: prometheus-client's own, which
    takes locks and cannot take many equal times at once, was a fifth of the event loop's time."""

    def __init__(self, registry: CollectorRegistry, model_name: str, name: str, about: str) -> None:
        self._described = f"{PREFIX}{name}", about
        self._model_name = model_name
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, seconds: float, count: int = 1) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += count
        self._sum += seconds * count

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(*self._described, labels=["model_name"])
        buckets = list(zip([*map(str, _SECONDS), "+Inf"], accumulate(self._counts)))
        family.add_metric([self._model_name], buckets, self._sum)
        yield family
