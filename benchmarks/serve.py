"""The server against the library: the same conversations through `opsin serve` and through `LLM.chat`.

Writes benchmarks/results/serve.md (also printed). Both sides get the same messages, pictures as data: URLs in
them, all at once, and give texts back. They take turns on the same cores, with pictures that are drawn afresh
every time, so that no cache knows them. The client that asks the server runs on these cores, too.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import report
import synthetic
import worker
from report import RESULTS, positive_number
from tqdm import tqdm
from workloads import draw_image

if TYPE_CHECKING:
    from opsin import LLM

Conversation = list[dict[str, Any]]

MAX_NUM_SEQS = 64
MAX_MODEL_LEN = 512
QUESTION_WORDS = 12
SAMPLING: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "skip_special_tokens": False}
"""Greedy, of fixed length, and with a text for every token: else there would be less to stream."""

MODES = ("whole", "streamed")
"""How the server is asked for its answers."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked.

    Attributes:
        model: as `opsin.LLM` takes it; None: the synthetic checkpoint.
        title: for people.
        num_requests: at once.
        new_tokens: generated for each.
        image_side: pixels.
    """

    model: str | None
    title: str
    num_requests: int
    new_tokens: int
    image_side: int


WORK = {
    "tiny": Work(
        model="opsin/tiny-qwen2vl",
        title="opsin/tiny-qwen2vl",
        num_requests=128,
        new_tokens=64,
        image_side=112,
    ),
    "synthetic": Work(
        model=None, title="synthetic Qwen2-VL (0.5B)", num_requests=64, new_tokens=32, image_side=224
    ),
}


@dataclass(frozen=True)
class Time:
    """What a run took.

    Attributes:
        seconds: on the clock.
        cpu_s: of all cores together, those of the client included; other programs disturb it less.
    """

    seconds: float
    cpu_s: float


@dataclass
class Result:
    """Times of one piece of work.

    Attributes:
        work: what was asked.
        pairs: per mode: library and server, one pair for each repetition.
        num_answers, num_equal: of the server's, and how many of them read as the library's.
    """

    work: Work
    pairs: dict[str, list[tuple[Time, Time]]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    num_answers: int = 0
    num_equal: int = 0


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare opsin serve with LLM.chat on the same work.")
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK), help="models (all)")
    parser.add_argument(
        "--repetitions",
        type=positive_number,
        default=3,
        help="timed ones, after a first (%(default)s)",
    )
    parser.add_argument(
        "--threads", type=positive_number, default=worker.usable_cores(), help="and cores (%(default)s)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for serve.md (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the server ends, too
    machine = worker.call(report.machine, threads=asked.threads)
    worker.settle(asked.threads)
    work = [WORK[name] for name in asked.only]
    if asked.quick:
        work = [replace(each, num_requests=each.num_requests // 4) for each in work]
    results = [measure(each, asked.repetitions) for each in work]
    asked.results.mkdir(parents=True, exist_ok=True)
    text = markdown(results, machine, asked.threads)
    (asked.results / "serve.md").write_text(text, encoding="utf-8")
    print("\n" + text)
    return 0


# ---- measuring ------------------------------------------------------------------------------------


def measure(work: Work, repetitions: int) -> Result:
    """Run one piece of work on both sides in turn."""
    from opsin import LLM

    result = Result(work)
    model = work.model or str(synthetic.checkpoint())
    with (
        tqdm(total=2 * len(MODES) * (repetitions + 1), desc=work.title, unit="run") as bar,
        serving(model) as (url, process),
        LLM(model, dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS) as llm,
    ):
        for repetition in range(repetitions + 1):
            for mode in MODES:
                conversations = draw(work, [repetition, MODES.index(mode)])
                stopwatch = Stopwatch(psutil.Process())
                expected = ask_library(llm, conversations, work.new_tokens)
                library = stopwatch.read()
                bar.update()
                stopwatch = Stopwatch(psutil.Process(), process)
                answers = ask_server(url, conversations, work.new_tokens, mode == "streamed")
                server = stopwatch.read()
                bar.update()
                if repetition:
                    result.pairs[mode].append((library, server))
                    result.num_answers += len(answers)
                    result.num_equal += sum(map(str.__eq__, answers, expected))
    return result


class Stopwatch:
    """Runs from its making on, over the CPU time of some processes, too."""

    def __init__(self, *processes: psutil.Process) -> None:
        self._processes = processes
        self._started = Time(time.perf_counter(), self._cpu_s())

    def read(self) -> Time:
        """What went by."""
        return Time(time.perf_counter() - self._started.seconds, self._cpu_s() - self._started.cpu_s)

    def _cpu_s(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)


def draw(work: Work, seed: Sequence[int]) -> list[Conversation]:
    """Questions about pictures; equal seeds give equal ones."""
    source = np.random.default_rng([synthetic.SEED, *seed])
    conversations = []
    for _ in range(work.num_requests):
        file = io.BytesIO()
        draw_image(source).resize((work.image_side, work.image_side)).save(file, "png")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        question = " ".join(source.choice(synthetic.WORDS, QUESTION_WORDS)) + "?"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        conversations.append([{"role": "user", "content": content}])
    return conversations


def ask_library(llm: LLM, conversations: list[Conversation], new_tokens: int) -> list[str]:
    """Texts."""
    from opsin import SamplingParams

    params = SamplingParams(max_tokens=new_tokens, **SAMPLING)
    outputs = llm.chat(conversations, params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def ask_server(url: str, conversations: list[Conversation], new_tokens: int, streamed: bool) -> list[str]:
    """Texts."""
    fields = {"max_tokens": new_tokens, "stream": streamed, **SAMPLING}
    bodies = [json.dumps({"messages": messages, **fields}).encode() for messages in conversations]
    address = urlsplit(url)

    async def ask(body: bytes) -> bytes:
        # By hand, and read only later: a real client would take more of the time than the server.
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        head = "POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        return answer

    async def ask_all() -> list[bytes]:
        return await asyncio.gather(*map(ask, bodies))

    return [read(answer, streamed) for answer in asyncio.run(ask_all())]


def read(answer: bytes, streamed: bool) -> str:
    """The text in an HTTP response."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.split(maxsplit=2)[1] != b"200":
        raise SystemExit(f"the server refused a request: {answer[:2000].decode()}")
    if not streamed:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    *events, end = [line.removeprefix(b"data: ") for line in body.splitlines() if line]
    if end != b"[DONE]":
        raise SystemExit(f"the server broke off a stream: {end.decode()}")
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)


@contextlib.contextmanager
def serving(model: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run ``opsin serve``; gives its URL and its process once it is ready."""
    flags = {"port": 0, "dtype": "float32", "max-model-len": MAX_MODEL_LEN, "max-num-seqs": MAX_NUM_SEQS}
    command = [sys.executable, "-m", "opsin", "serve", model]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen([*command, "--log-level", "warning"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if "listening on" in line), "")
        if not line:
            raise SystemExit("opsin serve did not start")
        url = line.split()[-1]
        while not is_ready(url):
            time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.communicate()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready"):
            return True
    except urllib.error.HTTPError:  # 503 while it loads; if loading fails, the connection is refused
        return False


# ---- results --------------------------------------------------------------------------------------


def markdown(results: Sequence[Result], machine: dict[str, str], threads: int) -> str:
    """The table, and what it was measured on."""
    lines = [
        "# `opsin serve` against `LLM.chat`",
        "",
        "Ratio: the library's time over the server's; median of the repetitions (least to most).",
        "CPU time is that of all cores; the client is part of the server's.",
        "",
        "| model | requests | answers | library | server | ratio | ratio of CPU time |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        work = result.work
        what = (
            f"{work.num_requests}, each its own {work.image_side}x{work.image_side} picture, "
            f"{work.new_tokens} new tokens"
        )
        for mode, pairs in result.pairs.items():
            library, server = zip(*pairs)
            lines.append(
                f"| {work.title} | {what} | {mode} | {seconds(library)} | {seconds(server)} | "
                f"{ratio([(ours.seconds, theirs.seconds) for ours, theirs in pairs])} | "
                f"{ratio([(ours.cpu_s, theirs.cpu_s) for ours, theirs in pairs])} |"
            )
    lines.append("")
    for result in results:
        lines.append(f"{result.work.title}: {result.num_equal} of {result.num_answers} answers are the same.")
    lines += ["", f"Cores and threads of both sides and the client together: {threads}.", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    return "\n".join(lines) + "\n"


def seconds(times: Sequence[Time]) -> str:
    median = statistics.median(time.seconds for time in times)
    cpu = statistics.median(time.cpu_s for time in times)
    return f"{median:.2f} s (CPU {cpu:.2f} s)"


def ratio(pairs: Sequence[tuple[float, float]]) -> str:
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


if __name__ == "__main__":
    sys.exit(main())
