"""Results to Markdown and JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import synthetic
from costs import Costs, total_flops
from floors import Floors
from sides import SIDES, DType, Measurement
from worker import Usage
from workloads import IMAGE_SIDE, TEXT_TOKENS, Workload, image_patches, image_tokens

RESULTS = Path(__file__).parent / "results"

TYPICAL_PROMPT = image_tokens() + sum(TEXT_TOKENS) // 2
"""Tokens of a prompt of average length; floors are counted with it."""


def positive_number(text: str) -> int:
    """A value of the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number


class DifferentPromptsError(Exception):
    """The sides turned the same request into different token ids, so nothing can be compared."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first difference between two generated sequences.

    Attributes:
        repetition, request: where.
        prefix: generated ids before it, equal on both sides.
        opsin, transformers: the two ids.
    """

    repetition: int
    request: int
    prefix: tuple[int, ...]
    opsin: int
    transformers: int


@dataclass
class Comparison:
    """One workload on both sides; the i-th measurements of both ran the same requests.

    Attributes:
        workload: what ran.
        measurements: per side, one for each repetition.
        gaps: transformers' logit of its own token less that of opsin's, at first differences.
    """

    workload: Workload
    measurements: dict[str, list[Measurement]] = field(default_factory=lambda: {side: [] for side in SIDES})
    gaps: list[float] = field(default_factory=list)

    def pairs(self) -> list[tuple[Measurement, Measurement]]:
        """(opsin, transformers) of each repetition."""
        return list(zip(self.measurements["opsin"], self.measurements["transformers"], strict=True))

    def differences(self) -> list[Difference]:
        """The first difference of every sequence that has one.

        Raises:
            DifferentPromptsError: the prompts' ids differ already.
        """
        found = []
        for repetition, (ours, theirs) in enumerate(self.pairs()):
            if ours.prompt_ids != theirs.prompt_ids:
                raise DifferentPromptsError(
                    f"{self.workload.name}: the sides made different token ids of the same prompts "
                    f"(lengths {list(map(len, ours.prompt_ids))} on opsin, "
                    f"{list(map(len, theirs.prompt_ids))} on transformers)"
                )
            for request, (mine, reference) in enumerate(zip(ours.output_ids, theirs.output_ids, strict=True)):
                for i, (a, b) in enumerate(zip(mine, reference, strict=True)):
                    if a != b:
                        found.append(
                            Difference(
                                repetition=repetition,
                                request=request,
                                prefix=mine[:i],
                                opsin=a,
                                transformers=b,
                            )
                        )
                        break
        return found


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything one run measured."""

    machine: dict[str, Any]
    dtype: DType
    threads: int
    small: bool
    comparisons: Sequence[Comparison]
    usage: dict[str, Usage]
    floors: Floors | None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table.

    Attributes:
        workload: which.
        name: what was timed.
        seconds: per side, one for each repetition.
        scale, unit: how seconds are shown.
    """

    workload: str
    name: str
    seconds: dict[str, list[float]]
    scale: float = 1.0
    unit: str = "s"

    @property
    def ratios(self) -> list[float]:
        """transformers' time over opsin's, repetition by repetition: how many times faster opsin was."""
        return [b / a for a, b in zip(self.seconds["opsin"], self.seconds["transformers"], strict=True)]


def machine() -> dict[str, Any]:
    """Facts about the machine and the libraries. Imports torch: call it in a process of its own."""
    import torch

    cpu, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts = dict(line.split(":", 1) for line in reversed(cpuinfo.read_text().splitlines()) if ":" in line)
        facts = {key.strip(): value.strip() for key, value in facts.items()}
        cpu, flags = facts.get("model name", cpu), facts.get("flags", "")
    interesting = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "instruction sets": [name for name in interesting if name in flags.split()],
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "memory bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "opsin": importlib.metadata.version("opsin"),
    }


def write(run: Run, folder: Path) -> str:
    """Write latest.md and latest.json into ``folder``; the Markdown is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(run)
    (folder / "latest.md").write_text(text, encoding="utf-8")
    data = {
        "machine": run.machine,
        "dtype": run.dtype,
        "threads": run.threads,
        "quick": run.small,
        "workloads": [
            {
                **asdict(c.workload),
                "figures": [{**asdict(f), "ratios": f.ratios} for f in figures(c)],
                "differences": [asdict(d) for d in c.differences()],
                "logit_gaps": c.gaps,
            }
            for c in run.comparisons
        ],
        "usage": {side: asdict(usage) for side, usage in run.usage.items()},
        "floors": asdict(run.floors) if run.floors else None,
    }
    (folder / "latest.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return text


def figures(comparison: Comparison) -> list[Figure]:
    """What is reported of one workload."""

    def each(time_of: Any) -> dict[str, list[float]]:
        return {side: [time_of(m) for m in ms] for side, ms in comparison.measurements.items()}

    title = comparison.workload.title
    if not comparison.workload.streamed:
        return [Figure(workload=title, name="whole call", seconds=each(lambda m: m.seconds))]
    return [
        Figure(
            workload=title,
            name="time to first token",
            seconds=each(lambda m: m.token_times[0]),
            scale=1e3,
            unit="ms",
        ),
        Figure(
            workload=title,
            name="inter-token latency (median)",
            seconds=each(inter_token_s),
            scale=1e3,
            unit="ms",
        ),
    ]


def inter_token_s(measurement: Measurement) -> float:
    """Median time between two tokens of a streamed request."""
    times = measurement.token_times
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def markdown(run: Run) -> str:
    """The tables."""
    sections = [_heading(run)]
    if run.comparisons:
        sections += [_comparison_table(run), _agreement(run), _memory_table(run)]
    if run.floors:
        sections += [_floor_table(run, run.floors)]
    return "\n\n".join(sections) + "\n"


def _heading(run: Run) -> str:
    facts = run.machine
    lines = [
        "# Benchmark",
        "Written by `make bench`. Synthetic Qwen2-VL checkpoint (Qwen2-0.5B text dimensions, 12-layer vision "
        f"tower of width 640, random weights), {run.dtype}, pictures of {IMAGE_SIDE} x {IMAGE_SIDE}, "
        f"prompts of {image_tokens()} picture and {TEXT_TOKENS[0]} to {TEXT_TOKENS[1]} text tokens.",
        f"- {facts['cpu']}, {run.threads} of {facts['cores']} cores used, "
        f"{facts['memory bytes'] / 2**30:.0f} GiB, {', '.join(facts['instruction sets']) or 'no AVX'} "
        f"(torch runs its {facts['torch capability']} code)\n"
        f"- {facts['system']}, Python {facts['python']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}, opsin {facts['opsin']}",
    ]
    if run.small:
        lines.insert(1, "**A quick run: too small for its figures to mean anything.**")
    return "\n\n".join(lines)


def _comparison_table(run: Run) -> str:
    rows = []
    for comparison in run.comparisons:
        for figure in figures(comparison):
            shown = [_spread(figure.seconds[side], figure.scale, figure.unit) for side in SIDES]
            ratios = figure.ratios
            ratio = f"**{statistics.median(ratios):.2f}x** ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append([f"{figure.workload}: {figure.name}", *shown, ratio])
        workload = comparison.workload
        if not workload.streamed:
            tokens = workload.num_requests * workload.new_tokens
            speed = [
                f"{tokens / statistics.median(m.seconds for m in comparison.measurements[side]):.1f} tokens/s"
                for side in SIDES
            ]
            rows.append([f"{workload.title}: generated", *speed, ""])
    repetitions = len(run.comparisons[0].pairs())
    return "\n\n".join(
        [
            "## opsin and transformers",
            f"Median (least to most) of {repetitions} repetitions on each side, taking turns in one run; the "
            "last column is transformers' time over opsin's in the same repetition. Image processing, "
            "tokenization and detokenization are inside. transformers: one left-padded `generate` of the "
            "whole batch, greedy, KV cache, SDPA attention; it cannot share a picture among requests, so "
            "the questions about one image are a batch that holds the image once for each.",
            _table(["", "opsin", "transformers", "opsin is faster"], rows),
            "Requests: "
            + "; ".join(
                f"{c.workload.title}: {c.workload.num_requests} of {c.workload.new_tokens} new tokens"
                for c in run.comparisons
            )
            + ".",
        ]
    )


def _agreement(run: Run) -> str:
    rows = []
    for comparison in run.comparisons:
        differences = comparison.differences()
        sequences = [ids for m in comparison.measurements["opsin"] for ids in m.output_ids]
        total = sum(map(len, sequences))
        agreed = total - sum(comparison.workload.new_tokens - len(d.prefix) for d in differences)
        cached = sum(m.num_cached_tokens for m in comparison.measurements["opsin"])
        prompts = sum(len(ids) for m in comparison.measurements["opsin"] for ids in m.prompt_ids)
        gaps = [abs(gap) for gap in comparison.gaps]
        rows.append(
            [
                comparison.workload.title,
                f"{len(sequences) - len(differences)} of {len(sequences)}",
                f"{agreed / total:.2%}",
                str(min((len(d.prefix) for d in differences), default="none")),
                f"{max(gaps):.1e}" if gaps else "none",
                f"{cached / prompts:.1%}",
            ]
        )
    columns = [
        "",
        "equal sequences",
        "tokens before a difference",
        "earliest difference",
        "widest logit gap at one",
        "prompt tokens opsin shared",
    ]
    return "\n\n".join(
        [
            "### Do both compute the same?",
            "Greedy tokens compared one by one. After a first difference two sequences go their own ways, so "
            "only what is before it counts; a gap near the dtype's rounding means that two tokens tied. "
            "The last column is the share of prompt tokens that opsin took from another request instead of "
            "computing them; there is nothing to take where every request has its own picture.",
            _table(columns, rows),
        ]
    )


def _memory_table(run: Run) -> str:
    rows = []
    for side in SIDES:
        usage = run.usage[side]
        sizes = [
            usage.loading_peak_bytes,
            usage.running_peak_bytes,
            usage.private_bytes,
            usage.mapped_bytes,
        ]
        shown = ["unknown" if size is None else f"{size / 2**30:.2f} GiB" for size in sizes]
        rows.append([side, f"{usage.loading_s:.1f} s", *shown, f"{usage.idle_cpu_share:.1%}"])
    columns = [
        "",
        "loaded in",
        "peak while loading",
        "peak while running",
        "private at the end",
        "mapped at the end",
        "CPU used while the other side ran",
    ]
    return "\n\n".join(
        [
            "### Memory",
            "Resident memory of each side's process. Peaks include pages of the mapped checkpoint, which the "
            "system takes back when it needs them; private memory it cannot.",
            _table(columns, rows),
        ]
    )


def _floor_table(run: Run, floors: Floors) -> str:
    costs = Costs(synthetic.CONFIG)
    element_bytes = {"float32": 4, "bfloat16": 2}[run.dtype]
    prefill = costs.prefill(TYPICAL_PROMPT, image_patches())
    measured = {comparison.workload.name: comparison for comparison in run.comparisons}
    best_call = max(floors.bandwidths, key=lambda name: floors.bandwidths[name])
    best_shape = max(floors.gemm_rates, key=lambda name: floors.gemm_rates[name])
    rows = []
    if "latency" in measured:
        comparison = measured["latency"]
        context = TYPICAL_PROMPT + comparison.workload.new_tokens // 2
        num_bytes = costs.decode_bytes([context], element_bytes)
        rows += [
            _floor_row(
                "decode, one request",
                f"{num_bytes / 1e9:.2f} GB at {floors.bandwidth / 1e9:.1f} GB/s",
                num_bytes / floors.bandwidth,
                comparison,
                inter_token_s,
            ),
            _floor_row(
                "prefill, one request (time to first token)",
                f"{total_flops(prefill) / 1e9:.0f} GFLOP at {floors.gemm_rate / 1e9:.0f} GFLOP/s",
                floors.at_best_rate_s(prefill),
                comparison,
                lambda m: m.token_times[0],
            ),
            _floor_row(
                "the same, each GEMM at its own shape's rate",
                "",
                floors.at_own_rates_s(prefill),
                comparison,
                lambda m: m.token_times[0],
            ),
        ]
    if "throughput" in measured:
        comparison = measured["throughput"]
        batch, steps = comparison.workload.num_requests, comparison.workload.new_tokens - 1
        contexts = [TYPICAL_PROMPT + steps // 2] * batch
        step = max(
            costs.decode_bytes(contexts, element_bytes) / floors.bandwidth,
            floors.at_best_rate_s(costs.decode(contexts)),
        )
        rows.append(
            _floor_row(
                "offline throughput, whole call",
                f"{batch} prefills and {steps} decode steps, each the larger of bytes and FLOPs",
                batch * floors.at_best_rate_s(prefill) + steps * step,
                comparison,
                lambda m: m.seconds,
            )
        )
    shapes = [[name, f"{rate / 1e9:.0f} GFLOP/s"] for name, rate in floors.gemm_rates.items()]
    calls = [[f"read, {name}", f"{rate / 1e9:.1f} GB/s"] for name, rate in floors.bandwidths.items()]
    parts = [
        "## The machine's floors",
        f"Memory is read at {floors.bandwidth / 1e9:.1f} GB/s at best ({best_call} over 2 GiB), matrices are "
        f"multiplied at {floors.gemm_rate / 1e9:.0f} GFLOP/s at best ({best_shape}). FLOPs and bytes are "
        "counted from config.json as `benchmarks/costs.py` documents.",
    ]
    if rows:
        parts.append(
            _table(["", "floor", "floor's time", "opsin / floor", "transformers / floor"], rows),
        )
    parts.append(_table(["call (rows x depth x columns of a GEMM)", "best rate"], calls + shapes))
    return "\n\n".join(parts)


def _floor_row(title: str, how: str, floor_s: float, comparison: Comparison, time_of: Any) -> list[str]:
    ratios = [
        f"{statistics.median(map(time_of, comparison.measurements[side])) / floor_s:.2f}x" for side in SIDES
    ]
    return [title, how, f"{floor_s * 1e3:.0f} ms", *ratios]


def _spread(seconds: Sequence[float], scale: float, unit: str) -> str:
    low, middle, high = (f(seconds) * scale for f in (min, statistics.median, max))
    digits = 0 if middle >= 1000 else 1 if middle >= 100 else 2
    return f"{middle:.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
