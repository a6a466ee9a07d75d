"""From the first byte of the socket to the last of a graceful end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from opsin import EngineConfig
from opsin.cli import main
from opsin.engine.engine import Engine
from opsin.errors import OpsinError
from opsin.server.engine_host import EngineHost
from tests.server.in_thread import MODEL, golden_config, running
from tests.server.messages import user
from tests.server.process import ServerProcess, serve

CHAT = "/v1/chat/completions"
FLAGS = ("--dtype", "float32", "--kv-cache-memory", str(2**23))


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": user("Hello"), "ignore_eos": True, "max_tokens": 400, **fields}


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs ``opsin serve`` without waiting for anything."""
    command = [sys.executable, "-m", "opsin", "serve", MODEL, "--port", "0", *FLAGS]
    with (tmp_path / "log").open("wb") as log:
        started = subprocess.Popen(command, stdout=log, stderr=subprocess.PIPE)
    yield started
    started.kill()
    started.wait()


def url_of(process: subprocess.Popen[bytes]) -> str:
    """The address it prints, as soon as it does."""
    assert process.stderr is not None
    for line in process.stderr:
        if b"listening on" in line:
            return line.split()[-1].decode()
    raise AssertionError("it ended without listening")


def test_while_loading_everything_is_answered_with_503() -> None:
    may_load = threading.Event()

    def build(config: EngineConfig) -> Engine:
        may_load.wait()
        return Engine(config)

    with running(golden_config(), build=build, wait=False) as loading:
        try:
            assert loading.get("/health").status_code == 200
            assert loading.get("/version").status_code == 200
            assert loading.get("/metrics").status_code == 200
            for response in (
                loading.get("/ready"),
                loading.get("/v1/models"),
                loading.post(CHAT, chat()),
                loading.post("/v1/completions", {"prompt": "x"}),
                loading.post("/v1/embeddings", {"input": "x"}),
                loading.post("/tokenize", {"prompt": "x"}),
            ):
                assert response.status_code == 503
                assert response.json()["error"]["message"] == "the model is loading"
                assert int(response.headers["Retry-After"]) > 0
        finally:
            may_load.set()
        loading.app.host.wait()
        assert loading.get("/ready").status_code == 200
        assert loading.post(CHAT, chat(max_tokens=2)).status_code == 200


def test_terminated_while_loading(process: subprocess.Popen[bytes]) -> None:
    url_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_terminated_under_load(tmp_path: Path) -> None:
    """What was accepted is finished, what comes later is told so, and the process ends in good order."""
    with serve(MODEL, *FLAGS, log=tmp_path / "log") as server, ThreadPoolExecutor(16) as pool:
        expected = requests.post(server.url + CHAT, json=chat(temperature=0), timeout=60).json()
        jobs = [
            pool.submit(
                requests.post,
                server.url + CHAT,
                json=chat(temperature=0, stream=number % 2 == 0),
                timeout=60,
            )
            for number in range(8)
        ]
        wait_for_running(server, 8)
        server.process.send_signal(signal.SIGTERM)
        wait_until_refusing(server)
        for path in (CHAT, "/tokenize"):
            refused = requests.post(server.url + path, json=chat(), timeout=10)
            assert refused.status_code == 503
            assert refused.json()["error"]["message"] == "the server is shutting down"
            assert int(refused.headers["Retry-After"]) > 0
        assert requests.get(server.url + "/ready", timeout=10).status_code == 503
        assert requests.get(server.url + "/health", timeout=10).status_code == 200
        assert not any(job.done() for job in jobs), "all this happened while they were running"
        answers = [job.result() for job in jobs]
        assert [answer.status_code for answer in answers] == [200] * 8
        for number, answer in enumerate(answers):
            if number % 2 == 0:
                assert answer.text.endswith("data: [DONE]\n\n")
            else:
                assert answer.json()["choices"] == expected["choices"]
        assert server.process.wait(30) == 0
        ended_by_itself(server)


def wait_for_running(server: ServerProcess, count: int) -> None:
    while True:
        text = requests.get(server.url + "/metrics", timeout=10).text
        [line] = [line for line in text.splitlines() if line.startswith("opsin:num_requests_running{")]
        if float(line.split()[-1]) == count:
            return
        time.sleep(0.005)


def wait_until_refusing(server: ServerProcess) -> None:
    while requests.get(server.url + "/ready", timeout=10).status_code == 200:
        time.sleep(0.005)


def ended_by_itself(server: ServerProcess) -> None:
    """`serve` wants its process to live to its end; this one has been told to die."""
    server.process.poll = lambda: None  # type: ignore[method-assign]
    assert "Traceback" not in server.log.read_text()


def test_second_signal_ends_at_once(process: subprocess.Popen[bytes]) -> None:
    url = url_of(process)
    while requests.get(url + "/ready", timeout=10).status_code != 200:
        time.sleep(0.02)
    body = chat(stream=True, max_tokens=2000)
    with requests.post(url + CHAT, json=body, stream=True, timeout=60) as stream:
        lines = stream.iter_lines()  # kept: the end of a generator is the end of the connection
        next(lines)
        process.send_signal(signal.SIGINT)
        while requests.get(url + "/ready", timeout=10).status_code == 200:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("/no/such/model",), "/no/such/model"),
        ((MODEL, "--max-model-len", "99999"), "max_model_len=99999"),
        ((MODEL, "--chat-template", "no-such-file.jinja"), "no-such-file.jinja"),
        ((MODEL, "--limit-mm-per-prompt", "images=2"), "images"),
        ((MODEL, "--host", "192.0.2.1"), "cannot listen on 192.0.2.1:0"),
        ((MODEL, "--uds", "/no/such/folder/socket"), "cannot listen on /no/such/folder/socket"),
        ((MODEL, "--api-key", ""), "--api-key"),
        ((MODEL, "--allowed-local-media-path", "/no/such/folder"), "/no/such/folder"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments, "--port", "0"])
    assert ended.value.code == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("opsin: ")
    assert says in last


def test_a_chat_server_without_a_template_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: EngineConfig) -> Engine:
        engine = Engine(config)
        engine.frontend.renderer.template = None
        return engine

    host = EngineHost(golden_config(), build)
    host.start()
    host.wait()
    with pytest.raises(OpsinError, match="--chat-template"):
        raise host.failure or AssertionError("it started")


def test_a_dead_engine_ends_the_server() -> None:
    """Whoever runs the server starts it again; staying up without an engine would help nobody."""

    def broken(step: object) -> object:
        raise OpsinError("the device is gone")

    with running(golden_config()) as server:
        server.engine.runner.run = broken  # type: ignore[method-assign, assignment]
        response = server.post(CHAT, chat())
        assert response.status_code == 500
        assert "gone" not in response.text
        while server.server.failure is None:
            time.sleep(0.01)
        assert str(server.server.failure) == "the device is gone"
