"""Where opsin's time goes: a table of torch ops, and what is left for Python.

The op times are each op's own (without the ops it calls), on the engine's thread; what the wall clock shows
beyond their sum is Python: scheduling, tensors' bookkeeping, detokenization.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import synthetic
import worker
from costs import Costs, Gemm
from sides import DType, OpsinSide
from tokenizers import Tokenizer
from workloads import WORKLOADS, Request, draw_requests, image_patches

GROUPS = {
    "attention": ("scaled_dot_product", "flash_attention", "softmax"),
    "matrix products": ("mm", "mv", "linear", "conv"),
    "copies and indexing": ("copy", "cat", "index", "clone", "contiguous", "gather", "scatter", "stack"),
}
"""Group -> parts of op names, tried in this order on the name behind ``::``; the rest is elementwise."""

PHASES = ("prefill", "decode", "batch-prefill", "batch-decode")
DECODE_STEPS = 16


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Profile opsin on the benchmark's synthetic checkpoint.",
        epilog=f"prefill is one request up to its first token, decode {DECODE_STEPS} steps of one request; "
        "batch- the same with the throughput workload's 16 requests. Times under the profiler are a little "
        "longer than without it; the first line has both.",
    )
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--dtype", choices=get_args(DType), default="float32")
    parser.add_argument("--threads", type=int, default=worker.usable_cores(), help="(%(default)s)")
    parser.add_argument("--top", type=int, default=20, help="ops or functions shown (%(default)s)")
    parser.add_argument("--shapes", action="store_true", help="tell ops apart by the shapes they got")
    parser.add_argument("--python", action="store_true", help="profile Python functions, not torch ops")
    return parser.parse_args(arguments)


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    asked = options()
    worker.settle(asked.threads)
    side = OpsinSide(synthetic.checkpoint(), asked.dtype)
    job = _job(side, asked.phase)
    job(0)()  # libraries compile and allocate on first use
    plain_s = _timed(job(1))
    if asked.python:
        profiler = cProfile.Profile()
        print(f"{asked.phase}: {plain_s * 1e3:.1f} ms unprofiled")
        profiler.runcall(job(2))
        pstats.Stats(profiler).sort_stats("tottime").print_stats(asked.top)
    else:
        _profile_ops(asked.phase, plain_s, job(2), asked.top, asked.shapes)
    return 0


def _job(side: OpsinSide, phase: str) -> Callable[[int], Callable[[], object]]:
    """Seed -> what is to be measured, everything before it done already."""
    from opsin import SamplingParams

    engine = side.llm.engine
    tokenizer = Tokenizer.from_file(str(synthetic.checkpoint() / "tokenizer.json"))
    workload = next(w for w in WORKLOADS if w.name == ("throughput" if "batch" in phase else "latency"))

    def steps_after_prefill(requests: list[Request]) -> Iterator[None]:
        """Yields once everything is prefilled, and after every step from then on."""
        params = SamplingParams(temperature=0, max_tokens=4 * DECODE_STEPS, ignore_eos=True)
        for i, request in enumerate(requests):
            prompt = {"prompt": request.text, "multi_modal_data": {"image": request.image}}
            engine.add(f"profiled-{i}", engine.frontend.processor.process(prompt), params)
        started: set[str] = set()
        while len(started) < len(requests):
            started |= {output.request_id for output in engine.step()}
        yield
        while engine.has_unfinished():
            engine.step()
            yield

    def make(seed: int) -> Callable[[], object]:
        requests = draw_requests(workload, seed, tokenizer)
        if "prefill" in phase:
            # One token is where prefill ends: the call does what comes before it and nothing after.
            return partial(side.run, replace(workload, new_tokens=1, streamed=False), requests)
        for request_id in [f"profiled-{i}" for i in range(len(requests))]:
            engine.abort(request_id)  # what the previous seed's run left unfinished
        steps = steps_after_prefill(requests)
        next(steps)

        def decode() -> None:
            for _ in range(DECODE_STEPS):
                next(steps)

        return decode

    return make


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _profile_ops(phase: str, plain_s: float, call: Callable[[], object], top: int, shapes: bool) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=shapes) as profiler:
        wall_s = _timed(call)
    events = sorted(profiler.key_averages(group_by_input_shape=shapes), key=lambda e: -e.self_cpu_time_total)
    ops_s = sum(event.self_cpu_time_total for event in events) / 1e6
    steps = DECODE_STEPS if "decode" in phase else 1
    per = f" for each of {steps} steps" if steps > 1 else ""
    plain_ms, wall_ms = plain_s / steps * 1e3, wall_s / steps * 1e3
    print(f"{phase}: {plain_ms:.1f} ms unprofiled, {wall_ms:.1f} ms profiled{per}\n")
    groups = dict.fromkeys([*GROUPS, "elementwise and the rest"], 0.0)
    for event in events:
        groups[_group(event.key)] += event.self_cpu_time_total / 1e6
    groups["outside torch ops (Python)"] = wall_s - ops_s
    for name, seconds in groups.items():
        print(f"  {name:28} {seconds / steps * 1e3:9.2f} ms  {seconds / wall_s:6.1%}")
    if phase == "prefill":
        _print_gemm_rate(groups["matrix products"])
    print()
    for event in events[:top]:
        _print_event(event, steps, wall_s, shapes)


def _print_gemm_rate(seconds: float) -> None:
    from report import TYPICAL_PROMPT

    work = Costs(synthetic.CONFIG).prefill(TYPICAL_PROMPT, image_patches())
    flops = sum(item.flops for item in work if isinstance(item, Gemm))
    rate = flops / seconds / 1e9
    print(f"\n  matrix products: about {rate:.0f} GFLOP/s (FLOPs counted for a prompt of average length)")


def _print_event(event: Any, steps: int, wall_s: float, shapes: bool) -> None:
    seconds = event.self_cpu_time_total / 1e6
    share, calls = seconds / wall_s, event.count / steps
    line = f"  {event.key:44.44} {seconds / steps * 1e3:9.3f} ms  {share:6.1%}  {calls:8.1f} calls"
    print(line + (f"  {event.input_shapes}" if shapes else ""))


def _group(op: str) -> str:
    name = op.rsplit("::", 1)[-1]
    for group, parts in GROUPS.items():
        if any(part in name for part in parts):
            return group
    return "elementwise and the rest"


if __name__ == "__main__":
    sys.exit(main())
