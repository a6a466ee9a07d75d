"""Many clients at once, half of whom leave in the middle of their answer."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.server.in_thread import MODEL, golden_config, running
from tests.server.messages import CAT, COFFEE, ROCKET, data_url, image, user
from tests.server.messages import text as words
from tests.server.process import ServerProcess, serve

CHAT = "/v1/chat/completions"
PICTURES = [data_url(name) for name in (CAT, COFFEE, ROCKET)]
QUESTIONS = 20
TIMEOUT_S = 300


def body(number: int, max_tokens: int) -> dict[str, Any]:
    """A question about a picture, one of `QUESTIONS`."""
    kind = number % QUESTIONS
    return {
        "messages": user(image(PICTURES[kind % 3]), words(f"What is number {kind}?")),
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }


async def answer(client: httpx2.AsyncClient, number: int) -> str:
    """The whole text."""
    async with client.stream("POST", CHAT, json=body(number, 24)) as response:
        assert response.status_code == 200, await response.aread()
        *events, end = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert end == "[DONE]", "the stream broke off"
    chunks = [json.loads(event) for event in events]
    assert not any("error" in chunk for chunk in chunks), chunks
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


async def leave(client: httpx2.AsyncClient, number: int, after: int) -> None:
    """Close the connection after some events of a long answer."""
    async with client.stream("POST", CHAT, json=body(number, 500)) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            assert line != "data: [DONE]", "there was no middle to leave in"
            after -= line != ""
            if after == 0:
                return


def watch(url: str, stop: Event, latencies: Connection) -> None:
    """Ask for /health until told to stop, in a process of its own: the other clients keep theirs busy."""
    measured = []
    with requests.Session() as session:
        while not stop.is_set():
            started = time.monotonic()
            assert session.get(url + "/health", timeout=TIMEOUT_S).status_code == 200
            measured.append(time.monotonic() - started)
            stop.wait(0.02)
    latencies.send(measured)


@contextmanager
def watching(url: str) -> Iterator[list[float]]:
    """How many seconds /health took during the block, filled in at its end."""
    spawn = get_context("spawn")
    latencies: list[float] = []
    mine, theirs = spawn.Pipe(duplex=False)
    stop = spawn.Event()
    process = spawn.Process(target=watch, args=(url, stop, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield latencies
    finally:
        stop.set()
        process.join()
    latencies += mine.recv()


def client_of(url: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, limits=httpx2.Limits(max_connections=None), trust_env=False
    )


async def alone(url: str) -> list[str]:
    """The answer to each question, asked by itself."""
    async with client_of(url) as client:
        return [await answer(client, number) for number in range(QUESTIONS)]


async def storm(url: str, count: int) -> list[str]:
    """``count`` streams at once, of which the odd ones are left; the answers to the even ones."""
    chance = random.Random(count)
    async with client_of(url) as client:
        leaving = [leave(client, number, chance.randint(1, 10)) for number in range(1, count, 2)]
        staying = [answer(client, number) for number in range(0, count, 2)]
        _, answers = await asyncio.gather(asyncio.gather(*leaving), asyncio.gather(*staying))
    return answers


def as_alone(expected: list[str], count: int) -> list[str]:
    return [expected[number % QUESTIONS] for number in range(0, count, 2)]


def test_nothing_of_the_clients_that_left_stays() -> None:
    """Looked at from within."""
    with running(golden_config(max_num_seqs=8, kv_cache_memory=2**21)) as server:
        expected = asyncio.run(alone(server.url))
        assert asyncio.run(storm(server.url, 24)) == as_alone(expected, 24)
        server.wait_idle()
        scheduler = server.engine.scheduler
        assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
        assert not any(scheduler.blocks._references)
        assert not scheduler.waiting
        assert not scheduler.running
        assert not scheduler._in_flight, "nobody may wait for a block that nobody computes"
        assert not any(scheduler.encoder_cache._pins.values())
        assert server.app.host.engine()._streams == {}
        assert asyncio.run(alone(server.url)) == expected


def metrics(server: ServerProcess) -> Mapping[str, float]:
    """Samples by name; those that tell reasons or routes apart added."""
    text = requests.get(server.url + "/metrics", timeout=TIMEOUT_S).text
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name.removeprefix("opsin:")] += sample.value
    return found


def wait_idle(server: ServerProcess) -> Mapping[str, float]:
    """Metrics once nothing is computed and nothing is waited for."""
    ends = time.monotonic() + TIMEOUT_S
    while time.monotonic() < ends:
        found = metrics(server)
        if found["num_requests_running"] == found["num_requests_waiting"] == 0:
            return found
        time.sleep(0.02)
    raise AssertionError("requests are stuck")


@pytest.mark.slow
def test_200_streams_half_of_them_left(tmp_path: Path) -> None:
    """Looked at as an operator does. Prints how long /health took meanwhile."""
    count, rounds = 200, 5
    resident: list[int] = []
    flags = ("--dtype", "float32", "--kv-cache-memory", str(2**23), "--max-num-seqs", "32")
    with serve(MODEL, *flags, log=tmp_path / "log") as server:
        expected = asyncio.run(alone(server.url))
        with watching(server.url) as latencies:
            for _ in range(rounds):
                assert asyncio.run(storm(server.url, count)) == as_alone(expected, count)
                found = wait_idle(server)
                assert found["kv_cache_usage_perc"] == 0
                resident.append(psutil.Process(server.process.pid).memory_info().rss)
        assert found["request_success_total"] == QUESTIONS + rounds * count, "those that were left, too"
        assert asyncio.run(alone(server.url)) == expected
        assert "Traceback" not in server.log.read_text()
    latencies.sort()
    print(
        f"\n/health, asked {len(latencies)} times: median {1000 * statistics.median(latencies):.0f} ms, "
        f"p99 {1000 * latencies[int(0.99 * len(latencies))]:.0f} ms, most {1000 * latencies[-1]:.0f} ms; "
        f"resident after each round: {', '.join(str(size >> 20) for size in resident)} MiB"
    )
    # What a round leaves behind must not add up: one body is 150 KB, its pictures' tensors as much.
    assert max(resident[2:]) - resident[1] < 16 * 2**20, resident
