"""Processes: one for each side, kept alive with its weights loaded, so that repetitions can alternate."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

from sides import SIDES, DType, Measurement
from workloads import Request, Workload

T = TypeVar("T")

# A spawned process starts clean; a forked one would inherit torch's threads and this one's memory.
_SPAWN = multiprocessing.get_context("spawn")


GRACE_S = 10
"""How long a process that has nothing left to do may take to end."""


class WorkerError(Exception):
    """The worker raised; the message is its traceback."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Resources of a worker.

    Attributes:
        loading_s: from starting to import the libraries to ready.
        loading_peak_bytes: most resident memory from start to loaded, mapped checkpoint pages included.
        running_peak_bytes: most resident memory since then; None where the system cannot tell them apart.
        private_bytes, mapped_bytes: resident memory now, the process's own and pages of mapped files (the
            system takes the latter back when it needs them); None where the system does not tell.
        idle_cpu_share: CPU seconds per second spent while waiting for the next job. More than a few
            hundredths means that idle threads spin and slow the other side down.
    """

    loading_s: float
    loading_peak_bytes: int
    running_peak_bytes: int | None
    private_bytes: int | None
    mapped_bytes: int | None
    idle_cpu_share: float


class Worker:
    """A side in a process of its own. Use as a context manager; leaving it ends the process."""

    def __init__(self, side: str, model: Path, dtype: DType, threads: int) -> None:
        self.side = side
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, side, model, dtype, threads), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, exception: object, *_: object) -> None:
        self._connection.close()  # an idle worker ends by itself then; a busy one is not waited for
        if exception is None:
            self._process.join(GRACE_S)
        _end(self._process)

    def wait_loaded(self) -> None:
        """Wait for the model. Call first, once."""
        self._receive()

    def run(self, workload: Workload, requests: Sequence[Request]) -> Measurement:
        """See `Side.run`."""
        measurement: Measurement = self._ask("run", workload, requests)
        return measurement

    def logit_gap(self, request: Request, prefix: Sequence[int], first: int, second: int) -> float:
        """See `TransformersSide.logit_gap`; the other side has none."""
        gap: float = self._ask("logit_gap", request, prefix, first, second)
        return gap

    def usage(self) -> Usage:
        """Resources used so far."""
        usage: Usage = self._ask("usage")
        return usage

    def _ask(self, job: str, *args: object) -> Any:
        self._connection.send((job, args))
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer, failed = self._connection.recv()
        except EOFError:
            self._process.join()
            raise WorkerError(
                f"the {self.side} worker ended with exit code {self._process.exitcode} and no message; "
                "exit code -9 is usually the system's out-of-memory killer"
            ) from None
        if failed:
            raise WorkerError(f"in the {self.side} worker:\n{answer}")
        return answer


def call(function: Callable[..., T], *args: object, threads: int) -> T:
    """Run a picklable function in a fresh process with this many threads, and give its result back."""
    mine, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_call, args=(theirs, function, args, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        answer, failed = mine.recv()
        process.join(GRACE_S)
    except EOFError:
        process.join()
        raise WorkerError(f"{function.__name__} ended with exit code {process.exitcode}") from None
    finally:
        _end(process)
    if failed:
        raise WorkerError(f"in {function.__name__}:\n{answer}")
    result: T = answer
    return result


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _serve(connection: Connection, name: str, model: Path, dtype: DType, threads: int) -> None:
    serve_jobs(connection, lambda: SIDES[name](model, dtype), threads)


def serve_jobs(connection: Connection, make: Callable[[], object], threads: int) -> None:
    """Be a worker: make a side, say so, and call its methods as the parent asks, until it is gone.

    Args:
        connection: to the parent. An answer is ``(what the method gave, False)``, or ``(traceback, True)``.
        make: makes the side; libraries are imported in it, since that is part of getting ready.
        threads: and cores of this process.
    """
    _obey_parent()
    settle(threads)
    with _reported(connection):
        start = time.perf_counter()
        side = make()
        loading_s = time.perf_counter() - start
        connection.send((None, False))
    loading_peak = _peak_bytes()
    separate = _reset_peak()
    idle_cpu_s = idle_s = 0.0
    while True:
        clock, cpu = time.perf_counter(), time.process_time()
        try:
            job, args = connection.recv()
        except EOFError:
            return
        idle_cpu_s += time.process_time() - cpu
        idle_s += time.perf_counter() - clock
        with _reported(connection):
            if job == "usage":
                answer: Any = Usage(
                    loading_s=loading_s,
                    loading_peak_bytes=loading_peak,
                    running_peak_bytes=_peak_bytes() if separate else None,
                    private_bytes=_status_bytes("RssAnon"),
                    mapped_bytes=_status_bytes("RssFile"),
                    idle_cpu_share=idle_cpu_s / max(idle_s, 1e-9),
                )
            else:
                answer = getattr(side, job)(*args)
            connection.send((answer, False))


def _call(connection: Connection, function: Callable[..., T], args: tuple[Any, ...], threads: int) -> None:
    _obey_parent()
    settle(threads)
    with _reported(connection):
        connection.send((function(*args), False))


def _end(process: SpawnProcess) -> None:
    """Have it end now: on a request at first, so that it can clean up behind itself."""
    process.terminate()
    process.join(GRACE_S)
    process.kill()
    process.join()


def _obey_parent() -> None:
    """Leave Ctrl-C to the parent, which ends this process; end in good order when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())


def settle(threads: int) -> None:
    """Fix cores and threads of this process; before torch is imported."""
    os.environ.update(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="true")
    if hasattr(os, "sched_getaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


@contextlib.contextmanager
def _reported(connection: Connection) -> Iterator[None]:
    """Send the traceback of whatever goes wrong in the block."""
    try:
        yield
    except Exception:
        connection.send((traceback.format_exc(), True))


def _peak_bytes() -> int:
    """The process's resident high-water mark."""
    peak = _status_bytes("VmHWM")
    if peak is None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def _status_bytes(name: str) -> int | None:
    """One entry of Linux's /proc/self/status."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0]) * 1024
    return None


def _reset_peak() -> bool:
    """Start the high-water mark anew (Linux, proc(5), clear_refs 5); whether that was possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
