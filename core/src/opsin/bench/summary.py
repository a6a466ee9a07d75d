"""From what was seen to figures, tables and files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opsin.bench.settings import ResultSettings
from opsin.errors import ConfigError

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What is known of one answered request; seconds.

    Attributes:
        arrival: when it was sent, from the start of the benchmark on.
        first_token: from being sent to the first token; None: it was not watched.
        gaps: between what came after the first token.
        total: from being sent to the end.
        num_prompt_tokens, num_output_tokens: as the engine counts them.
    """

    arrival: float
    first_token: float | None
    gaps: Sequence[float]
    total: float
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first; None for a single token."""
        if self.first_token is None or self.num_output_tokens < 2:
            return None
        return (self.total - self.first_token) / (self.num_output_tokens - 1)


@dataclass(kw_only=True)
class Results:
    """What a benchmark found.

    Attributes:
        kind: ``throughput``, ``latency`` or ``serve``.
        model: its name.
        settings: that it ran with.
        duration: seconds on the clock.
        timings: of the answered requests.
        failures: what requests failed with.
        times: more series of seconds to summarise, by name.
        more: further facts, by name.
    """

    kind: str
    model: str
    settings: Mapping[str, Any]
    duration: float
    timings: Sequence[Timing]
    failures: Sequence[str] = ()
    times: Mapping[str, Sequence[float]] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def series(self) -> dict[str, list[float]]:
        """Seconds by what they are of; only what was seen."""
        found = {
            "ttft": [t.first_token for t in self.timings if t.first_token is not None],
            "tpot": [t.per_token for t in self.timings if t.per_token is not None],
            "itl": [gap for t in self.timings for gap in t.gaps],
            "e2el": [t.total for t in self.timings],
            **{name: list(values) for name, values in self.times.items()},
        }
        return {name: values for name, values in found.items() if values}


TITLES = {
    "ttft": "time to first token",
    "tpot": "time per token after it",
    "itl": "between tokens",
    "e2el": "whole request",
    "batch": "whole batch",
}


def as_json(results: Results) -> dict[str, Any]:
    """Everything as plain data; names are vLLM's, milliseconds where they say ``_ms``."""
    prompt, output = _tokens(results)
    found: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "benchmark": results.kind,
        "model": results.model,
        "duration": results.duration,
        "completed": len(results.timings),
        "failed": len(results.failures),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(results.timings) / results.duration,
        "output_throughput": output / results.duration,
        "total_token_throughput": (prompt + output) / results.duration,
    }
    for name, values in results.series.items():
        found |= {
            f"mean_{name}_ms": float(np.mean(values)) * 1e3,
            f"median_{name}_ms": float(np.median(values)) * 1e3,
            f"std_{name}_ms": float(np.std(values)) * 1e3,
            **{f"p{p}_{name}_ms": float(np.percentile(values, p)) * 1e3 for p in PERCENTILES},
        }
    errors = {text: results.failures.count(text) for text in dict.fromkeys(results.failures)}
    return {**found, **results.more, "errors": errors, "settings": dict(results.settings)}


def rows(results: Results) -> list[list[str]]:
    """Counts and rates, for a table."""
    found = as_json(results)
    lines = [
        ["model", results.model],
        ["answered", str(found["completed"])],
        ["failed", str(found["failed"])],
        ["duration", f"{found['duration']:.2f} s"],
        ["prompt tokens", str(found["total_input_tokens"])],
        ["generated tokens", str(found["total_output_tokens"])],
        ["requests", f"{found['request_throughput']:.2f} /s"],
        ["generated", f"{found['output_throughput']:.1f} tokens/s"],
        ["prompt and generated", f"{found['total_token_throughput']:.1f} tokens/s"],
    ]
    return [*lines, *([name.replace("_", " "), str(value)] for name, value in results.more.items())]


def time_rows(results: Results) -> list[list[str]]:
    """Mean and percentiles in milliseconds, for a table."""
    return [
        [
            TITLES.get(name, name),
            *(f"{v * 1e3:.1f}" for v in (np.mean(values), *np.percentile(values, PERCENTILES))),
        ]
        for name, values in results.series.items()
    ]


def write(results: Results, settings: ResultSettings) -> list[Path]:
    """Write the JSON files that the settings ask for; gives their paths.

    Raises:
        ConfigError: a file cannot be written.
    """
    text = json.dumps(as_json(results), indent=2, ensure_ascii=False) + "\n"
    wanted = [Path(settings.output_json)] if settings.output_json else []
    if settings.save_result:
        name = results.model.rstrip("/").rpartition("/")[2] or "model"
        own = f"opsin-{results.kind}-{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
        wanted.append(Path(settings.result_dir) / (settings.result_filename or own))
    try:
        for path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None
    return wanted


def _tokens(results: Results) -> tuple[int, int]:
    return (
        sum(timing.num_prompt_tokens for timing in results.timings),
        sum(timing.num_output_tokens for timing in results.timings),
    )
