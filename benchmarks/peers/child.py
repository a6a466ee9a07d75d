"""A side in a process of its own, of any environment: ``python -m peers.child FILE_DESCRIPTOR``.

The first message says what to make; then `worker.serve_jobs` answers. Only numpy, pillow and tqdm are needed
besides the engine itself.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from worker import serve_jobs, usable_cores
from workloads import Request, Workload

from peers.measured import PeerSide, Sample

SIDES = {
    "opsin": "peers.engines.in_torch:Opsin",
    "transformers": "peers.engines.in_torch:Transformers",
    "openvino": "peers.engines.in_openvino:OpenVino",
    "llamacpp": "peers.engines.in_llamacpp:LlamaCpp",
}

PackedRequest = tuple[str, tuple[int, int], bytes]
"""Text, size and RGB pixels: environments have different versions of pillow, whose pickles may differ."""


class Watched:
    """A side that also says how much it was disturbed."""

    def __init__(self, side: PeerSide) -> None:
        self.side = side

    def run(self, workload: Workload, requests: Sequence[PackedRequest]) -> Sample:
        """See `PeerSide.run`."""
        from PIL import Image

        unpacked = [
            Request(text=text, image=Image.frombytes("RGB", size, pixels)) for text, size, pixels in requests
        ]
        before = _busy_s(), time.process_time(), time.perf_counter()
        result = self.side.run(workload, unpacked)
        after = _busy_s(), time.process_time(), time.perf_counter()
        return Sample(result=result, disturbance=_disturbance(before, after))

    def about(self) -> dict[str, str]:
        """What the side says about itself: versions, precision."""
        return self.side.about()


Moment = tuple[float | None, float, float]
"""Busy seconds of all cores, CPU seconds of this process, the clock."""


def _disturbance(before: Moment, after: Moment) -> float | None:
    if before[0] is None or after[0] is None:
        return None
    others = (after[0] - before[0]) - (after[1] - before[1])
    return max(0.0, others) / ((after[2] - before[2]) * (os.cpu_count() or 1))


def _busy_s() -> float | None:
    """Seconds that all cores together were not idle, time taken by the hypervisor included (proc(5))."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
        int, stat.read_text().partition("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Serve until the parent is gone."""
    connection = Connection(int(sys.argv[1]))
    peer, model, settings, threads = connection.recv()
    module, _, name = SIDES[peer].partition(":")

    def make() -> Watched:
        side: Any = getattr(importlib.import_module(module), name)
        return Watched(side(Path(model), settings, threads or usable_cores()))

    serve_jobs(connection, make, threads)


if __name__ == "__main__":
    main()
