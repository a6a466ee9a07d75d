"""A turn: a fresh process gets one row ready, runs every workload, tells its memory, and ends.

Turns of all rows follow each other, then again: A B C A B C. Only one engine is in memory at a time, so that
none is disturbed by another's threads, and getting ready is measured as often as everything else.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from worker import GRACE_S, Usage, WorkerError
from workloads import Workload, draw_requests, warm_up

from peers.catalogue import LATENCY_SAMPLES, Row
from peers.child import PackedRequest
from peers.exports import BENCHMARKS
from peers.measured import Sample

WARM_UP_REQUESTS = 4

CLEAN = 0.03
"""Most disturbance of a sample that counts as clean."""


@dataclass(kw_only=True)
class Turn:
    """What one turn measured.

    Attributes:
        row: its name.
        round: number of the turn among the row's.
        usage: see `Usage`; of the whole turn.
        about: what the side says about itself.
        samples: per workload: dicts with ``seconds``, ``token_times``, ``num_prompt_tokens``,
            ``num_output_tokens``, ``first_ids`` (of the first request's answer) and ``disturbance``.
    """

    row: str
    round: int
    usage: dict[str, Any]
    about: dict[str, str]
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Process:
    """A side in a process of its own. Use as a context manager; leaving it ends the process."""

    def __init__(self, row: Row, python: str, model: Path, threads: int) -> None:
        self.name = row.name
        mine, theirs = socket.socketpair()
        environment = dict(os.environ)
        if python != sys.executable:  # our packages are not theirs
            environment.pop("PYTHONPATH", None)
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            self._process = subprocess.Popen(
                [python, "-m", "peers.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=BENCHMARKS,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        self._connection = Connection(mine.detach())
        self._connection.send((row.peer, str(model), dict(row.settings), threads))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, exception: object, *_: object) -> None:
        self._connection.close()  # an idle side ends by itself then; a busy one is not waited for
        if exception is None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def receive(self) -> Any:
        """An answer; the first one says that the side is ready.

        Raises:
            WorkerError: with the traceback.
        """
        try:
            answer, failed = self._connection.recv()
        except (EOFError, ConnectionResetError):
            _, errors = self._process.communicate()
            last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise WorkerError(
                f"the process of {self.name} ended with exit code {self._process.returncode}: {last[0]}"
            ) from None
        if failed:
            raise WorkerError(answer)
        return answer

    def ask(self, job: str, *args: object) -> Any:
        """Call a method of the side, or ``usage``."""
        self._connection.send((job, args))
        return self.receive()


def take(
    row: Row,
    number: int,
    python: str,
    model: Path,
    tokenizer: Tokenizer,
    workloads: Sequence[Workload],
    threads: int,
    retries: int,
) -> Iterator[Turn]:
    """Take a turn; gives what it has measured after each workload, so that nothing is lost if it is stopped.

    Args:
        row: whose.
        number: of the round; every row gets the same requests in it.
        python: interpreter with the row's packages.
        model: the checkpoint, or its export.
        tokenizer: of the checkpoint; prompts are drawn with it.
        workloads: to run.
        threads: and cores.
        retries: how often a disturbed sample is measured again.

    Raises:
        WorkerError: the side could not be made, or failed.
    """
    with Process(row, python, model, threads) as process:
        process.receive()
        samples: dict[str, list[dict[str, Any]]] = {}
        for workload in workloads:
            times = LATENCY_SAMPLES if workload.streamed else 1
            few = replace(warm_up(workload), num_requests=min(WARM_UP_REQUESTS, workload.num_requests))
            process.ask("run", few, _requests(few, 0, tokenizer))
            taken = samples[workload.name] = []
            left = retries
            while sum(map(_is_clean, taken)) < times and (len(taken) < times or left > 0):
                left -= len(taken) >= times
                seed = 1 + number * 100 + len(taken)
                taken.append(_plain(process.ask("run", workload, _requests(workload, seed, tokenizer))))
            usage: Usage = process.ask("usage")
            yield Turn(
                row=row.name,
                round=number,
                usage=asdict(usage),
                about=process.ask("about"),
                samples=dict(samples),
            )


def _requests(workload: Workload, seed: int, tokenizer: Tokenizer) -> list[PackedRequest]:
    drawn = draw_requests(workload, seed, tokenizer)
    return [(request.text, request.image.size, request.image.tobytes()) for request in drawn]


def _is_clean(sample: dict[str, Any]) -> bool:
    return sample["disturbance"] is None or sample["disturbance"] <= CLEAN


def _plain(sample: Sample) -> dict[str, Any]:
    result = sample.result
    return {
        "seconds": result.seconds,
        "token_times": list(result.token_times),
        "num_prompt_tokens": result.num_prompt_tokens,
        "num_output_tokens": sum(map(len, result.output_ids)),
        "first_ids": list(result.output_ids[0]),
        "disturbance": sample.disturbance,
    }
