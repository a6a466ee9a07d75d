"""What tensor parallelism costs and gains on this machine: sums over ranks, and one rank against two.

    python benchmarks/ranks.py [--model FOLDER]

Sums: gloo against memory that processes share, two processes of one thread each. Ranks: one process with two
threads against two with one thread each, taking turns on the synthetic model; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 5
SUMS = ((1, 896), (16, 896), (300, 896))

CHILD = """
import os, sys, time, statistics
import torch
from opsin.api import Parallel, RankLink
from opsin.kernels import all_reduce as by_group
from opsin.rank.worker import join, meeting_store
from opsin_device_cpu.device import open_device
rank, port, memory = map(int, sys.argv[1:4])
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cores[rank % len(cores)]})
device = open_device(0)
link = RankLink(memory=memory, own_cores=len(cores) > 1, check=lambda: None, timeout=60)
place = Parallel(rank=rank, world_size=2, link=link)
join(device, place, meeting_store(port, 60), 60)
from opsin_device_cpu.compiled.ranks import all_reduce as by_memory
for rows, width in SUMS:
    times = {}
    for _ in range(5):
        for name, op in (("gloo", by_group), ("memory", by_memory)):
            x = torch.ones(rows, width)
            for _ in range(20):
                op(x, place)
            started = time.perf_counter()
            for _ in range(200):
                op(x, place)
            times.setdefault(name, []).append((time.perf_counter() - started) / 200 * 1e6)
    if rank == 0:
        gloo, shared = (statistics.median(times[name]) for name in ("gloo", "memory"))
        ratio = f"gloo {gloo:.0f} us, shared memory {shared:.1f} us, {gloo / shared:.0f}x"
        print(f"sum of {rows} x {width}: {ratio}", flush=True)
""".replace("SUMS", repr(SUMS))


def sums() -> None:
    """Sums over two ranks, both ways."""
    from opsin.rank.worker import meeting_store

    store = meeting_store(0, 60)
    memory = os.memfd_create("opsin-bench")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(rank), str(store.port), str(memory)], pass_fds=[memory]
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.wait()


ASK = """
import sys, time
from opsin import LLM, SamplingParams
import numpy as np
world, model, dtype = int(sys.argv[1]), sys.argv[2], sys.argv[3]
llm = LLM(model, tensor_parallel_size=world, dtype=dtype, kv_cache_memory=2**28 // world)
prompt = {"prompt_token_ids": list(range(100, 400))}
greedy = lambda n: SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
llm.generate(prompt, greedy(4), use_tqdm=False)
first, between, many = [], [], []
for round in range(3):
    llm.reset_prefix_cache()
    started = time.perf_counter(); llm.generate(prompt, greedy(1), use_tqdm=False)
    first.append(time.perf_counter() - started)
    started = time.perf_counter(); llm.generate(prompt, greedy(33), use_tqdm=False)
    between.append((time.perf_counter() - started) / 33)
    started = time.perf_counter(); llm.generate([prompt] * 16, greedy(16), use_tqdm=False)
    many.append(time.perf_counter() - started)
middle = lambda x: sorted(x)[1]
print(f"{middle(first):.3f} {middle(between) * 1e3:.1f} {middle(many):.2f}")
llm.close()
"""


def ranks(model: Path, dtype: str) -> None:
    """One rank of two threads and two ranks of one thread, in turns."""
    found: dict[int, list[list[float]]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for world in found:
            done = subprocess.run(
                [sys.executable, "-c", ASK, str(world), str(model), dtype],
                capture_output=True,
                text=True,
                check=True,
            )
            found[world].append([float(text) for text in done.stdout.split()])
    for world, rounds in found.items():
        first, between, many = (statistics.median(column) for column in zip(*rounds))
        told = f"first token {first:.3f} s, between {between:.1f} ms, 16 at once {many:.2f} s"
        print(f"{world} rank(s), {dtype}: {told}")


def main() -> None:
    """Measure both."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", type=Path, help="a checkpoint; without one only sums are measured")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    started = time.monotonic()
    sums()
    if given.model is not None:
        ranks(given.model, given.dtype)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
