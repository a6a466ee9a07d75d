"""Prometheus metrics. Names are vLLM's with the prefix ``opsin:``."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from opsin.results import EngineStats, RequestOutput

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts what happens. Belongs to the event loop."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(model_name)
        self._registry.register(self._engine)
        labels = {"model_name": model_name}

        def histogram(name: str, about: str) -> _Histogram:
            made = _Histogram(f"opsin:{name}", about, labels)
            self._registry.register(made)
            return made

        def counter(name: str, about: str) -> Counter:
            return Counter(f"opsin:{name}", about, list(labels), registry=self._registry).labels(**labels)

        self._time_to_first_token = histogram(
            "time_to_first_token_seconds", "From the request's arrival, preprocessing included."
        )
        self._inter_token = histogram("inter_token_latency_seconds", "Between two tokens of one sample.")
        self._end_to_end = histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue = histogram("request_queue_time_seconds", "Waiting for the engine.")
        self._preprocessing = histogram(
            "request_preprocessing_time_seconds", "Fetching, decoding, rendering and tokenizing."
        )
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens, pictures expanded.")
        self._generated_tokens = counter("generation_tokens", "Generated tokens.")
        self._finished = Counter(
            "opsin:request_success",
            "Samples that ended.",
            [*labels, "finished_reason"],
            registry=self._registry,
        )
        self._http = Counter(
            "opsin:http_requests",
            "HTTP requests answered.",
            ["method", "handler", "status"],
            registry=self._registry,
        )
        self._model_name = model_name

    def text(self, stats: EngineStats | None) -> bytes:
        """Prometheus' text format; ``stats`` is None while there is no engine."""
        self._engine.stats = stats
        return generate_latest(self._registry)

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
        self._finished.labels(self._model_name, "stop").inc()

    def track(self, started: float) -> Track:
        """Follow a request that arrived at ``started`` of `time.monotonic`."""
        return Track(self, started)


class Track:
    """One request's way through the metrics."""

    def __init__(self, metrics: Metrics, started: float) -> None:
        self._metrics = metrics
        self._started = started
        self._last: float | None = None
        self._num_tokens = 0

    def saw(self, output: RequestOutput) -> None:
        """The request has got so far."""
        metrics, now, times = self._metrics, time.monotonic(), output.metrics
        num_tokens = sum(len(sample.token_ids) for sample in output.outputs)
        new = num_tokens - self._num_tokens
        gaps = new
        if self._last is None and new:
            # The engine knows the first token's time also where only the whole answer is seen.
            first = times.first_token_time if times is not None else None
            self._last = now if first is None else first
            metrics._prompt_tokens.inc(len(output.prompt_token_ids))
            metrics._time_to_first_token.observe(self._last - self._started)
            if times is not None and times.first_scheduled_time is not None:
                metrics._queue.observe(times.first_scheduled_time - times.arrival_time)
            gaps = 0 if first is None else new - len(output.outputs)
        if self._last is not None and gaps > 0:
            gap = (now - self._last) * len(output.outputs) / gaps
            metrics._inter_token.observe(gap, gaps)
        if new:
            metrics._generated_tokens.inc(new)
            self._last, self._num_tokens = now, num_tokens
        if output.finished:
            metrics._end_to_end.observe(now - self._started)
            for sample in output.outputs:
                metrics._finished.labels(metrics._model_name, sample.finish_reason or "abort").inc()

    def ended_early(self, num_samples: int) -> None:
        """The client has left, or the request has failed on the way."""
        self._metrics._finished.labels(self._metrics._model_name, "abort").inc(num_samples)


class _Histogram(Collector):
    """Times in seconds; belongs to one thread. There is one for every token: prometheus-client's own, which
    takes locks and cannot take many equal ones at once, was a fifth of the event loop's time."""

    def __init__(self, name: str, about: str, labels: Mapping[str, str]) -> None:
        self._name = name
        self._about = about
        self._labels = labels
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, count: int = 1) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += count
        self._sum += seconds * count

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._about, labels=list(self._labels))
        bounds = [*map(str, _SECONDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts)))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family


class _EngineCollector(Collector):
    """The engine's gauges and counters at the moment of the question."""

    stats: EngineStats | None = None

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        if stats is None:
            return
        yield self._gauge("num_requests_running", "Sequences being computed.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences waiting.", stats.num_waiting)
        yield self._gauge(
            "kv_cache_usage_perc", "KV blocks in use, 1 for all.", stats.kv_blocks_used / stats.kv_blocks
        )
        yield self._gauge("encoder_cache_bytes", "Encoder outputs held.", stats.encoder_cache_bytes)
        yield self._gauge("mm_cache_bytes", "Preprocessed media held.", stats.media_cache_bytes)
        yield self._counter("prefix_cache_queries", "Blocks looked up.", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Blocks found.", stats.prefix_hits)
        yield self._counter("encoder_cache_queries", "Media needed encoded.", stats.encoder_queries)
        yield self._counter("encoder_cache_hits", "Media found encoded.", stats.encoder_hits)
        yield self._counter("mm_cache_queries", "Media needed preprocessed.", stats.media_queries)
        yield self._counter("mm_cache_hits", "Media found preprocessed.", stats.media_hits)
        yield self._counter("num_preemptions", "Sequences pushed out.", stats.num_preemptions)

    def _gauge(self, name: str, about: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"opsin:{name}", about, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, about: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(f"opsin:{name}", about, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family
