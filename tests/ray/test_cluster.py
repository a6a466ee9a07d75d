"""A cluster of two nodes on this machine (`make test-ray`): the server, and a job, survive a lost process."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from opsin import LLM, SamplingParams
from tests.models.golden import GOLDEN
from tests.server.pictures import picture

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

MODEL = "opsin/tiny-qwen2vl"
SETTINGS: dict[str, Any] = {"kv_cache_memory": 2**25}
COLOURS = ["red", "green", "blue", "yellow"]
PORT = 8473


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([str(GOLDEN.parents[1]), os.environ.get("PYTHONPATH", "")])
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"MLU": 2}})
    made.add_node(num_cpus=2)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def url_of(colour: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture((112, 112), colour)).decode()}"


def messages(colour: str) -> list[dict[str, Any]]:
    shown = {"type": "image_url", "image_url": {"url": url_of(colour)}}
    return [{"role": "user", "content": [shown, {"type": "text", "text": "What colour is the picture?"}]}]


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    with LLM(MODEL, **SETTINGS) as llm:
        params = SamplingParams(temperature=0, max_tokens=12)
        outputs = llm.chat([messages(colour) for colour in COLOURS], params, use_tqdm=False)
    return {colour: output.outputs[0].text for colour, output in zip(COLOURS, outputs, strict=True)}


def alive(name: str) -> list[int]:
    """The processes of the actors with something in their name or class."""
    from ray.util.state import list_actors

    actors = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
    return [actor.pid for actor in actors if name in f"{actor.name} {actor.class_name}"]


def test_serve_answers_truthfully_and_survives_an_engine(cluster: Any, expected: dict[str, str]) -> None:
    from ray import serve

    from opsin.ray import app

    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(app(MODEL, replicas=2, server={"api_key": ["secret"]}, **SETTINGS), name="opsin")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="secret", max_retries=0)

    def ask(number: int) -> tuple[str, str]:
        colour = COLOURS[number % 4]
        answer = client.chat.completions.create(
            model=MODEL, messages=messages(colour), max_tokens=12, temperature=0
        )
        return colour, answer.choices[0].message.content

    def stream(number: int) -> tuple[str, str]:
        colour = COLOURS[number % 4]
        chunks = client.chat.completions.create(
            model=MODEL, messages=messages(colour), max_tokens=12, temperature=0, stream=True
        )
        return colour, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    assert client.models.list().data[0].id == MODEL
    with ThreadPoolExecutor(8) as pool:
        assert all(text == expected[colour] for colour, text in pool.map(ask, range(24)))
        assert all(text == expected[colour] for colour, text in pool.map(stream, range(24)))
    with pytest.raises(openai.BadRequestError, match="did you mean"):
        client.chat.completions.create(model=MODEL, messages=messages("red"), extra_body={"temprature": 1})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()

    victims = alive("opsin-engine")
    assert len(victims) == 2
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, number) for number in range(200)]
        while sum(answer.done() for answer in answers) < 40:
            time.sleep(0.01)
        os.kill(victims[0], signal.SIGKILL)
        found = [answer.result() for answer in answers]
    assert all(text == expected[colour] for colour, text in found)
    while len(alive("opsin-engine")) < 2:
        time.sleep(0.2)
    serve.delete("opsin")


def test_a_job_of_500_pictures_survives_a_worker(
    cluster: Any, expected: dict[str, str], tmp_path: Path
) -> None:
    from opsin import EngineConfig
    from opsin.ray.batch import run_on_ray
    from opsin.server.batch.rows import Source
    from opsin.server.settings import ServerSettings

    rows = tmp_path / "in.jsonl"
    with rows.open("w") as file:
        for number in range(500):
            body = {"messages": messages(COLOURS[number % 4]), "max_tokens": 12, "temperature": 0}
            row = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(row) + "\n")
        file.write("no json\n")
    out = tmp_path / "out.jsonl"
    killed: list[int] = []

    def kill() -> None:
        while not out.exists() or out.read_bytes().count(b"\n") < 100:
            time.sleep(0.02)
        killed.append(alive("Answers")[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    done = run_on_ray(
        EngineConfig(model=MODEL, max_num_seqs=8, **SETTINGS),
        ServerSettings(any_model_name=True),
        Source(path=rows),
        out,
        replicas=2,
    )
    killer.join()
    assert killed
    assert (done.num_written, done.num_failed) == (501, 1)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    answers = {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in lines
        if line["response"]["status_code"] == 200
    }
    assert len(lines) == 501
    assert answers == {f"r{number}": expected[COLOURS[number % 4]] for number in range(500)}


def test_chips_are_taken_by_locks(tmp_path: Path) -> None:
    import subprocess
    import sys

    from opsin.errors import ConfigError
    from opsin.ray.chips import take_chips

    folder = tmp_path / "locks"
    assert take_chips("chip", 2, 4, folder) == 0
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from opsin.ray.chips import take_chips\n"
            "print(take_chips('chip', 2, 4, Path(sys.argv[1])), flush=True); time.sleep(600)",
            str(folder),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "2\n"
    with pytest.raises(ConfigError, match="2 free chip chips in a row are needed; this node has 4"):
        take_chips("chip", 2, 4, folder)
    holder.kill()
    holder.wait()
    assert take_chips("chip", 2, 4, folder) == 2


def test_the_kubernetes_manifest_is_an_application() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    manifest = yaml.safe_load((GOLDEN.parents[1] / "docs" / "kuberay.yaml").read_text())
    schema = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    assert schema.applications[0].import_path == "opsin.ray:build"
