"""Several engines behind one door: where requests go, what is counted, what happens when one is killed."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from opsin.server.replicas.host import ReplicaClient
from opsin.server.replicas.routing import affinity, choose
from opsin.server.replicas.totals import Totals
from tests.models.golden import GOLDEN
from tests.server.pictures import picture
from tests.server.process import ServerProcess, serve

MODEL = str(GOLDEN / "qwen2vl" / "model")
CHAT = "/v1/chat/completions"
NUM_PICTURES = 10


def asked(number: int, **fields: Any) -> dict[str, Any]:
    """A chat about one of ten pictures."""
    colour = f"#{number % NUM_PICTURES * 23:02x}40{number % NUM_PICTURES * 11:02x}"
    url = f"data:image/png;base64,{base64.b64encode(picture((56, 56), colour)).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": f"Question {number}"},
    ]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    return {**body, "ignore_eos": True, **fields}


# ---- Routing -------------------------------------------------------------------------------------


def test_requests_about_a_picture_have_one_key() -> None:
    keys = [affinity(json.dumps(asked(number)).encode()) for number in range(40)]
    assert len(set(keys)) == NUM_PICTURES
    assert keys[3] == keys[13] == keys[23]
    by_url = json.dumps({"image_url": "http://host/x", "text": "a"}).encode()
    assert affinity(by_url) == affinity(by_url.replace(b'"a"', b'"b"'))
    assert affinity(by_url) != affinity(by_url.replace(b"/x", b"/y"))


def test_requests_without_pictures_meet_by_their_beginning() -> None:
    def key(text: str, **fields: Any) -> bytes:
        return affinity(json.dumps({**fields, "messages": [{"role": "user", "content": text}]}).encode())

    shared = "You are helpful. " * 60
    assert key(shared + "a") == key(shared + "b", temperature=1) != key("another" + shared)
    assert affinity(b"no json") == affinity(b"no json")


@given(st.binary(max_size=40), st.dictionaries(st.integers(0, 9), st.integers(0, 50), min_size=1))
def test_a_replica_is_chosen_that_has_room(key: bytes, loads: dict[int, int]) -> None:
    chosen = choose(key, loads)
    assert loads[chosen] <= max(1.5 * (sum(loads.values()) + 1) / len(loads) + 4, min(loads.values()))
    idle = dict.fromkeys(loads, 0)
    home = choose(key, idle)
    rest = {replica: 0 for replica in idle if replica != home}
    if rest:  # who ends takes no key of others along
        for other in rest:
            without = {replica: 0 for replica in idle if replica != other}
            assert choose(key, without) == home


def test_keys_are_spread() -> None:
    found = Counter(choose(b"%d" % number, {0: 0, 1: 0, 2: 0}) for number in range(3000))
    assert all(900 < count < 1100 for count in found.values())


# ---- Metrics -------------------------------------------------------------------------------------

TEXT = """# TYPE opsin:generation_tokens_total counter
opsin:generation_tokens_total{{model_name="m"}} {tokens}
# TYPE opsin:num_requests_running gauge
opsin:num_requests_running{{model_name="m"}} {running}
# TYPE opsin:kv_cache_usage_perc gauge
opsin:kv_cache_usage_perc{{model_name="m"}} 0.5
# TYPE opsin:http_requests_total counter
opsin:http_requests_total 7
"""


def values(totals: Totals) -> dict[str, float]:
    samples = [sample for metric in totals.collect() for sample in metric.samples]
    return {f"{sample.name} {sample.labels.get('replica', '')}".strip(): sample.value for sample in samples}


def test_counts_survive_the_replica_that_counted() -> None:
    totals = Totals()
    totals.take(0, TEXT.format(tokens=10, running=2))
    totals.take(1, TEXT.format(tokens=5, running=1))
    totals.ended(0)
    totals.take(0, TEXT.format(tokens=3, running=4))
    assert values(totals) == {
        "opsin:generation_tokens_total": 18,
        "opsin:num_requests_running": 5,
        "opsin:kv_cache_usage_perc": 0.5,
        "opsin_replica:generation_tokens_total 0": 13,
        "opsin_replica:generation_tokens_total 1": 5,
        "opsin_replica:num_requests_running 0": 4,
        "opsin_replica:num_requests_running 1": 1,
        "opsin_replica:kv_cache_usage_perc 0": 0.5,
        "opsin_replica:kv_cache_usage_perc 1": 0.5,
    }


def test_a_replica_that_ended_before_its_request_was_sent_is_lost_like_any_other() -> None:
    """Its client is closed by then: whoever asks, for answers or metrics, has one kind of error to expect."""

    async def ask() -> None:
        client = ReplicaClient(base_url="http://replica")
        await client.aclose()
        with pytest.raises(httpx2.HTTPError, match="has ended"):
            await client.get("/metrics")
        with pytest.raises(httpx2.HTTPError, match="has ended"):
            await client.send(client.build_request("POST", CHAT, content=b"{}"), stream=True)

    asyncio.run(ask())


# ---- Processes -----------------------------------------------------------------------------------

FLAGS = ("--dtype", "float32", "--kv-cache-memory", str(2**23), "--max-waiting", "400")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serve(MODEL, *FLAGS, log=tmp_path_factory.mktemp("one") / "log") as server:
        yield server


@pytest.fixture
def two(tmp_path: Path) -> Iterator[ServerProcess]:
    with serve(MODEL, *FLAGS, "--data-parallel-size", "2", log=tmp_path / "log") as server:
        yield server


def replicas_of(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()


def metric(server: ServerProcess, name: str) -> float:
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    return sum(
        float(value) for value in re.findall(rf"^opsin:{name}(?:_total)?{{[^}}]*}} (\S+)$", text, re.M)
    )


def ask(server: ServerProcess, number: int) -> str:
    """The answer of a stream, or ``error``: what a client sees who reads to the end."""
    text = ""
    with requests.post(
        f"{server.url}{CHAT}", json=asked(number, stream=True), stream=True, timeout=120
    ) as response:
        if response.status_code != 200:
            return f"error {response.json()['error']['message']}"
        for line in response.iter_lines():
            if line in (b"", b"data: [DONE]"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                return f"error {event['error']['message']}"
            text += event["choices"][0]["delta"].get("content", "")
    return text


def test_pictures_meet_in_one_replica(one: ServerProcess, two: ServerProcess) -> None:
    with ThreadPoolExecutor(40) as pool:
        expected = list(pool.map(lambda number: ask(one, number), range(200)))
        found = list(pool.map(lambda number: ask(two, number), range(200)))
    assert found == expected
    assert not any(text.startswith("error") for text in found)
    alone, together = (metric(server, "encoder_cache_hits") for server in (one, two))
    assert together >= 0.9 * alone > 0
    tokens = re.findall(
        r'^opsin_replica:generation_tokens_total{[^}]*replica="(\d)"} (\S+)$',
        requests.get(f"{two.url}/metrics", timeout=30).text,
        re.M,
    )
    assert len(tokens) == 2
    assert all(float(value) > 100 for _, value in tokens)
    assert metric(two, "generation_tokens") == sum(float(value) for _, value in tokens) == 200 * 8


def test_a_killed_replica_costs_nobody_more_than_an_error(two: ServerProcess) -> None:
    victim = replicas_of(two)[0]
    with ThreadPoolExecutor(40) as pool:
        answers = [pool.submit(ask, two, number) for number in range(200)]
        while sum(answer.done() for answer in answers) < 60:
            time.sleep(0.005)
        victim.kill()
        found = [answer.result() for answer in answers]
    errors = [text for text in found if text.startswith("error")]
    assert len(errors) <= 40
    assert all("has ended" in text or "replicas ended" in text for text in errors), errors
    assert all(text for text in found)
    text = requests.get(f"{two.url}/metrics", timeout=30).text
    answered = rf'http_requests_total{{handler="{CHAT}",method="POST",status="(\d+)"}} (\S+)'
    counts = {status: float(count) for status, count in re.findall(answered, text)}
    assert sum(counts.values()) == 200
    assert counts.get("503", 0) == sum("replicas ended" in text for text in errors)
    while len(alive := [child for child in replicas_of(two) if child.is_running()]) < 2 or victim in alive:
        time.sleep(0.05)
    while "is ready" not in (log := two.log.read_text()) or log.count("is ready (process") < 3:
        time.sleep(0.05)
    assert not any(ask(two, number).startswith("error") for number in range(20))
    assert requests.get(f"{two.url}/health", timeout=10).status_code == 200


def test_what_a_replica_refuses_the_door_refuses(two: ServerProcess) -> None:
    wrong = requests.post(f"{two.url}{CHAT}", json=asked(0, temprature=1), timeout=30)
    assert wrong.status_code == 400
    assert "did you mean 'temperature'" in wrong.json()["error"]["message"]
    models = requests.get(f"{two.url}/v1/models", timeout=30).json()
    assert models["data"][0]["id"] == MODEL
    assert requests.get(f"{two.url}/nowhere", timeout=30).status_code == 404


def test_a_replica_that_cannot_start_ends_the_server(tmp_path: Path) -> None:
    log, flags = tmp_path / "log", ("--data-parallel-size", "2", "--max-model-len", "999999")
    failed = pytest.raises(AssertionError, match=r"replica \d could not start: it ended with status 1")
    with failed, serve(MODEL, *FLAGS, *flags, log=log):
        pass
    assert "max_model_len=999999 is greater" in log.read_text()
