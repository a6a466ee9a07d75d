"""opsin against transformers on one synthetic checkpoint, and both against what the machine can do.

Writes benchmarks/results/latest.md (the tables, also printed) and latest.json (every repetition).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import floors
import report
import synthetic
import worker
from costs import Costs
from report import RESULTS, Comparison, Run, positive_number
from sides import SIDES, DType
from tokenizers import Tokenizer
from tqdm import tqdm
from workloads import WORKLOADS, Request, Workload, draw_requests, image_patches, quick, warm_up

FLOOR_ROUNDS = 7
MAX_LOGIT_GAPS = 8
"""Sequences whose gap at the first difference is looked up, at most, for each workload."""


PARTS = (*(workload.name for workload in WORKLOADS), "floors")


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Benchmark opsin against transformers, and both against what the machine can do.",
        epilog=(
            "Both sides run the same requests on the same synthetic Qwen2-VL checkpoint (2.3 GB, built on\n"
            "the first run) in the same dtype, in two processes that take turns: A B A B. A ratio is\n"
            "transformers' time over opsin's in the same repetition.\n\n"
            "Leave the machine alone meanwhile; a full run takes about a quarter of an hour on two cores.\n\n"
            "  benchmarks/run.py --quick              does everything work?\n"
            "  benchmarks/run.py --only latency       one workload\n"
            "  benchmarks/run.py --only latency floors  and how far it is from the machine's floors\n"
        ),
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (all)")
    parser.add_argument(
        "--repetitions", type=positive_number, default=5, help="timed repetitions on each side (%(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(DType),
        default="float32",
        help="what both sides run in (%(default)s); the checkpoint's file is float32",
    )
    parser.add_argument(
        "--threads",
        type=positive_number,
        default=worker.usable_cores(),
        help="threads and cores of each side (%(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few requests, few tokens, two repetitions: to try it out"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for latest.md and latest.json (%(default)s)"
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    asked = options()
    workloads = [quick(w) if asked.quick else w for w in WORKLOADS if w.name in asked.only]
    repetitions = min(asked.repetitions, 2) if asked.quick else asked.repetitions
    measured: list[floors.Floors] = []
    comparisons: list[Comparison] = []
    usage: dict[str, worker.Usage] = {}
    try:
        model = synthetic.checkpoint()
        if "floors" in asked.only:
            measured.append(_floors(asked.dtype, asked.threads))
        if workloads:
            comparisons, usage = _compare(model, workloads, asked.dtype, asked.threads, repetitions)
        if workloads and "floors" in asked.only:
            # Once more: a shared machine may be faster now, and a floor is the best it can do.
            measured.append(_floors(asked.dtype, asked.threads))
        run = Run(
            machine=worker.call(report.machine, threads=asked.threads),
            dtype=asked.dtype,
            threads=asked.threads,
            small=asked.quick,
            comparisons=comparisons,
            usage=usage,
            floors=floors.best_of(measured) if measured else None,
        )
        print("\n" + report.write(run, asked.results))
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except (worker.WorkerError, report.DifferentPromptsError) as error:
        print(f"the benchmark cannot go on: {error}", file=sys.stderr)
        return 1
    return 0


def _floors(dtype: DType, threads: int) -> floors.Floors:
    print("measuring the machine's floors ...", file=sys.stderr)
    work = Costs(synthetic.CONFIG).prefill(report.TYPICAL_PROMPT, image_patches())
    return worker.call(floors.measure, work, dtype, threads, FLOOR_ROUNDS, threads=threads)


def _compare(
    model: Path, workloads: list[Workload], dtype: DType, threads: int, repetitions: int
) -> tuple[list[Comparison], dict[str, worker.Usage]]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    comparisons = [Comparison(workload) for workload in workloads]
    num_runs = len(workloads) * (repetitions + 1) * len(SIDES)
    with ExitStack() as stack, tqdm(total=num_runs, unit="run") as bar:
        sides: dict[str, worker.Worker] = {}
        for side in SIDES:
            bar.set_description(f"loading {side}")
            sides[side] = stack.enter_context(worker.Worker(side, model, dtype, threads))
            sides[side].wait_loaded()
        drawn: list[list[Request]]
        for comparison in comparisons:
            workload = comparison.workload
            drawn = []
            for repetition in range(repetitions + 1):
                requests = draw_requests(workload, repetition, tokenizer)
                for side, process in sides.items():
                    bar.set_description(f"{workload.name} on {side}")
                    if repetition == 0:
                        process.run(warm_up(workload), requests)
                    else:
                        comparison.measurements[side].append(process.run(workload, requests))
                    bar.update()
                if repetition > 0:
                    drawn.append(requests)
            for difference in comparison.differences()[:MAX_LOGIT_GAPS]:
                bar.set_description(f"{workload.name}: logit gap where the sides differ")
                request = drawn[difference.repetition][difference.request]
                comparison.gaps.append(
                    sides["transformers"].logit_gap(
                        request, difference.prefix, difference.transformers, difference.opsin
                    )
                )
        usage = {side: process.usage() for side, process in sides.items()}
    return comparisons, usage


if __name__ == "__main__":
    sys.exit(main())
