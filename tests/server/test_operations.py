"""What an operator relies on: health, names, metrics, keys, proxies, sockets, an idle event loop."""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
import trustme
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import opsin
from opsin.server.settings import Listen, ServerSettings
from opsin.server.ui import UI_PATHS
from tests.server.in_thread import MODEL, Running, golden_config, running
from tests.server.messages import CAT, data_url, image, text, user
from tests.server.pictures import picture
from tests.server.process import serve

CHAT = "/v1/chat/completions"


def metrics(server: Running) -> dict[str, float]:
    """All samples, those of different labels added."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def test_about_the_server(server: Running) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
    assert server.get("/version").json() == {"version": opsin.__version__}
    cards = server.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["golden", "golden-too"]
    assert cards[0]["root"] == MODEL
    assert cards[0]["max_model_len"] == 2048
    assert cards[0]["modalities"] == ["text", "image", "video"]
    assert [model.id for model in server.client().models.list()] == ["golden", "golden-too"]


def test_tokens_there_and_back(server: Running) -> None:
    words = "Hello, wörld!"
    answer = server.post("/tokenize", {"prompt": words, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": words}
    assert server.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    every = server.post("/detokenize", {"tokens": list(range(608))})
    assert every.status_code == 200, "also those of the vocabulary that the tokenizer does not have"


def test_tokenize_expands_pictures(server: Running) -> None:
    messages = user(image(data_url(CAT)), text("?"))
    tokens = server.post("/tokenize", {"messages": messages}).json()
    answer = server.post(CHAT, {"messages": messages, "max_tokens": 1}).json()
    assert tokens["count"] == answer["usage"]["prompt_tokens"]
    assert tokens["tokens"].count(572) > 10, "<|image_pad|>"


@pytest.fixture
def fresh() -> Iterator[Running]:
    with running(golden_config()) as started:
        yield started


def test_metrics(fresh: Running) -> None:
    """Exact numbers, so of a server that has seen nothing yet."""
    before = metrics(fresh)
    messages = user(image(data_url(picture((56, 84), "teal"))), text("?"))
    body = {"messages": messages, "max_tokens": 5, "ignore_eos": True}
    answers = [fresh.post(CHAT, body).json()["usage"] for _ in range(2)]
    after = metrics(fresh)

    def grew(name: str) -> float:
        return after[f"opsin:{name}"] - before.get(f"opsin:{name}", 0)

    assert grew("request_success_total") == 2
    assert grew("generation_tokens_total") == 10
    assert grew("prompt_tokens_total") == 2 * answers[0]["prompt_tokens"]
    assert grew("time_to_first_token_seconds_count") == 2
    assert 2 <= grew("inter_token_latency_seconds_count") <= 8, "tokens may come together"
    assert grew("e2e_request_latency_seconds_count") == 2
    assert grew("request_preprocessing_time_seconds_count") == 2
    blocks = answers[0]["prompt_tokens"] // 16
    assert blocks == 2
    assert grew("prefix_cache_queries_total") == 2 * blocks
    assert grew("prefix_cache_hits_total") == blocks
    assert [answer["prompt_tokens_details"]["cached_tokens"] for answer in answers] == [0, 16 * blocks]
    assert grew("encoder_cache_queries_total") == 1, "the second time the prefix cache has the picture"
    assert grew("encoder_cache_hits_total") == 0
    assert grew("mm_cache_queries_total") == 2
    assert grew("mm_cache_hits_total") == 1
    assert grew("http_requests_total") == 3, "both chats, and the first look at the metrics"
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"opsin:{gauge}"] == 0
    assert all(name.startswith(("opsin:", "process_")) for name in after)


def test_metrics_of_speculation(server: Running) -> None:
    """Its counters have vLLM's names, and its answers are those without it."""
    body = {"messages": user("a b a b a b a b"), "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    wanted = server.post(CHAT, body).json()["choices"]
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
    with running(golden_config(speculative_config=drafts)) as guessing:
        assert guessing.post(CHAT, body).json()["choices"] == wanted
        found = metrics(guessing)
        text = guessing.get("/metrics").text
    assert found["opsin:spec_decode_num_accepted_tokens_total"] > 0
    assert found["opsin:spec_decode_num_drafts_total"] <= found["opsin:spec_decode_num_draft_tokens_total"]
    assert (
        found["opsin:spec_decode_num_accepted_tokens_total"]
        == found["opsin:spec_decode_num_accepted_tokens_per_pos_total"]
    ), "of all positions"
    assert re.findall(r'per_pos_total\{.*position="(\d)"', text) == ["0", "1", "2"]


def test_gauges_while_something_runs(server: Running) -> None:
    body = {"messages": user("Hello"), "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with requests.post(server.url + CHAT, json=body, stream=True, timeout=60) as response:
        lines = response.iter_lines()  # kept: the end of a generator is the end of the connection
        next(lines)
        found = metrics(server)
    assert found["opsin:num_requests_running"] == 1
    assert 0 < found["opsin:kv_cache_usage_perc"] < 1


# --------------------------------------------------------------------------------------------------
# Request ids and the access log
# --------------------------------------------------------------------------------------------------


def test_request_ids(server: Running) -> None:
    for path in ("/health", "/nothing"):
        assert server.get(path, headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    streamed = {"messages": user("x"), "stream": True, "max_tokens": 1}
    assert server.post(CHAT, streamed, headers={"X-Request-Id": "s"}).headers["X-Request-Id"] == "s"
    made = {server.get("/health").headers["X-Request-Id"] for _ in range(3)}
    assert len(made) == 3
    for bad in ("x" * 200, "a b", "<script>"):
        assert server.get("/health", headers={"X-Request-Id": bad}).headers["X-Request-Id"] != bad


def test_equal_request_ids_do_not_disturb_each_other(server: Running) -> None:
    body = {"messages": user("Hello"), "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(server.post, CHAT, body, headers={"X-Request-Id": "same"}) for _ in range(4)]
        answers = [job.result() for job in jobs]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.json()["id"] for answer in answers}) == 4


def test_access_log(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "opsin.access"):
        server.get("/nothing%0d%0aforged%20line", headers={"X-Request-Id": "logged"})
        lines: list[str] = []
        deadline = time.monotonic() + 10
        while not lines and time.monotonic() < deadline:  # it is written after the answer
            lines = [text for text in caplog.messages if "id=logged" in text]
    [line] = lines
    assert '"GET /nothing\\r\\nforged line" 404' in line
    assert "\n" not in line


# --------------------------------------------------------------------------------------------------
# Keys, origins, prefixes, sockets
# --------------------------------------------------------------------------------------------------

KEYS = ("first-key", "second-key-längs")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    settings = ServerSettings(
        api_key=KEYS,
        root_path="/api",
        allowed_origins=("https://page.example",),
        trust_request_chat_template=True,
    )
    with running(golden_config(), settings) as started:
        yield started


def test_every_route_needs_a_key(guarded: Running) -> None:
    paths = {(method, route.path) for route in guarded.app.api.routes for method in route.methods}  # type: ignore[attr-defined]
    assert ("POST", CHAT) in paths
    assert ("GET", "/openapi.json") in paths
    paths |= {("GET", "/nothing"), ("POST", "/v1/anything"), ("GET", "/health/"), ("GET", "//health")}
    paths |= {("GET", "/api/v1/models"), ("GET", "/api/metrics"), ("PUT", CHAT)}
    for method, path in paths:
        for key in (
            None,
            "Bearer wrong",
            "Bearer",
            "Bearer ",
            f"Basic {KEYS[0]}",
            KEYS[0],
            "Bearer first-ke",
        ):
            headers = {} if key is None else {"Authorization": key}
            response = requests.request(method, guarded.url + path, headers=headers, timeout=10)
            if path in ("/health", "/ping", "/version", *UI_PATHS):
                assert response.status_code in (200, 405)
                continue
            assert response.status_code == 401, (method, path, key)
            if method != "HEAD":
                assert response.json()["error"]["type"] == "AuthenticationError"
            assert response.headers["WWW-Authenticate"] == "Bearer"


def test_any_of_the_keys_opens(guarded: Running) -> None:
    for key in KEYS:
        headers = {"Authorization": b"Bearer " + key.encode()}
        assert guarded.get("/v1/models", headers=headers).status_code == 200
    answer = guarded.client(KEYS[0]).chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=2
    )
    assert answer.usage is not None
    with pytest.raises(openai.AuthenticationError):
        guarded.client("wrong").models.list()


def test_the_page_is_open_and_holds_nothing(guarded: Running) -> None:
    for path in UI_PATHS:
        response = guarded.get(path)
        assert response.status_code == 200
        assert MODEL not in response.text
        assert "Content-Security-Policy" in response.headers


def test_without_the_page() -> None:
    with running(golden_config(), ServerSettings(ui=False, api_key=("k",)), wait=False) as bare:
        assert bare.get("/").status_code == 401
        assert bare.get("/", headers={"Authorization": "Bearer k"}).status_code == 404


def test_prefix_of_a_proxy(guarded: Running) -> None:
    """Whether the proxy takes the prefix off or not."""
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    for path in ("/v1/models", "/api/v1/models"):
        assert guarded.get(path, headers=headers).status_code == 200
    assert guarded.get("/api/health").status_code == 200
    schema = guarded.get("/openapi.json", headers=headers).json()
    assert schema["servers"] == [{"url": "/api"}]
    assert schema["security"] == [{"key": []}]


def test_origins(guarded: Running, server: Running) -> None:
    def preflight(at: Running, origin: str) -> Any:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return requests.options(at.url + CHAT, headers=headers, timeout=10).headers

    name = "Access-Control-Allow-Origin"
    assert preflight(guarded, "https://page.example")[name] == "https://page.example"
    assert name not in preflight(guarded, "https://other.example")
    assert name not in preflight(server, "https://page.example"), "closed unless opened"
    assert name not in server.get("/health", headers={"Origin": "https://page.example"}).headers


def test_template_of_a_request_where_it_is_trusted(guarded: Running) -> None:
    headers = {"Authorization": f"Bearer {KEYS[0]}"}

    def prompt(template: str) -> requests.Response:
        body = {"messages": user("Hello"), "chat_template": template}
        return guarded.post("/tokenize", body, headers=headers)

    tokens = prompt("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}").json()["tokens"]
    text = guarded.post("/detokenize", {"tokens": tokens}, headers=headers).json()["prompt"]
    assert text == "[user]Hello"
    for bad in (
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% if %}",
        "{{ raise_exception('no') }}",
    ):
        response = prompt(bad)
        assert response.status_code == 400, response.text
        assert "uid=" not in response.text


def test_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with running(golden_config(), listen=Listen(uds=path), wait=False) as started:
        assert started.url == path
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(path)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {"status": "ok"}
        connection.close()


def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    key, chain, root = (str(tmp_path / name) for name in ("key.pem", "chain.pem", "root.pem"))
    certificate.private_key_pem.write_to_path(key)
    certificate.cert_chain_pems[0].write_to_path(chain)
    authority.cert_pem.write_to_path(root)
    listen = Listen(port=0, ssl_keyfile=key, ssl_certfile=chain)
    with running(golden_config(), listen=listen, wait=False) as started:
        assert started.url.startswith("https://")
        assert requests.get(f"{started.url}/health", verify=root, timeout=10).status_code == 200
        with pytest.raises((requests.exceptions.SSLError, ssl.SSLError)):
            requests.get(f"{started.url}/health", timeout=10)


# --------------------------------------------------------------------------------------------------
# The event loop stays free; a client that leaves takes its request along
# --------------------------------------------------------------------------------------------------


def test_health_answers_while_large_pictures_are_decoded(server: Running) -> None:
    """32 pictures of 4 megapixels: seconds of decoding. /health is asked all the while."""
    pixels = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((2000, 2000))

    def body(number: int) -> dict[str, Any]:
        file = io.BytesIO()
        large.putpixel((0, 0), (8 * number, 0, 0))
        large.save(file, "JPEG", quality=50)
        kwargs = {"max_pixels": 28 * 28 * 16}
        messages = user(image(data_url(file.getvalue())), text(str(number)))
        return {"messages": messages, "max_tokens": 1, "mm_processor_kwargs": kwargs}

    bodies = [body(number) for number in range(32)]
    asked = answered = 0
    done = threading.Event()

    def ask_health() -> None:
        nonlocal asked, answered
        while not done.is_set():
            asked += 1
            answered += server.get("/health").status_code == 200
            time.sleep(0.01)

    watching = threading.Thread(target=ask_health)
    watching.start()
    try:
        with ThreadPoolExecutor(32) as pool:
            statuses = list(pool.map(lambda b: server.post(CHAT, b).status_code, bodies))
    finally:
        done.set()
        watching.join()
    assert statuses == [200] * 32
    assert answered == asked
    assert answered >= 32, "more health checks than pictures: they did not wait in line"


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_ends_its_request(server: Running, stream: bool) -> None:
    body = {"messages": user("Hello"), "max_tokens": 2000, "ignore_eos": True, "stream": stream}
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    if stream:
        connection.getresponse().read(10)
    else:
        while not server.engine.has_unfinished():
            time.sleep(0.005)
    before = metrics(server)["opsin:generation_tokens_total"]
    connection.close()
    server.wait_idle()
    made = metrics(server)["opsin:generation_tokens_total"] - before
    assert made < 1900
    assert server.engine.stats().kv_blocks_used == 0
    aborted = 'opsin:request_success_total{finished_reason="abort",model_name="golden"}'
    counted = [line for line in server.get("/metrics").text.splitlines() if line.startswith(aborted)]
    assert len(counted) == 1
    assert float(counted[0].split()[-1]) >= 1


def test_client_that_leaves_while_its_picture_is_fetched(server: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.png"
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        body = json.dumps({"messages": user(image(url))})
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        silent.settimeout(10)
        fetching, _ = silent.accept()
        connection.close()
        server.wait_idle()
        fetching.settimeout(10)
        while fetching.recv(4096):
            pass
        fetching.close()


# --------------------------------------------------------------------------------------------------
# For programs that watch
# --------------------------------------------------------------------------------------------------


def test_lines_of_json(tmp_path: Path) -> None:
    with serve(
        MODEL,
        "--dtype",
        "float32",
        "--kv-cache-memory",
        str(2**22),
        "--log-format",
        "json",
        log=tmp_path / "log",
    ) as process:
        assert requests.get(f"{process.url}/health", headers={"X-Request-Id": "mine"}, timeout=10).ok
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("opsin: ")]
    records = [json.loads(line) for line in lines]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, records))
    [access] = [record for record in records if record.get("request_id") == "mine"]
    assert (access["method"], access["path"], access["status"]) == ("GET", "/health", 200)
    assert access["seconds"] >= 0


def test_metrics_under_vllms_names() -> None:
    with running(golden_config(), ServerSettings(vllm_metric_names=True)) as started:
        text = started.get("/metrics").text
    own = {line for line in text.splitlines() if line.startswith("opsin:")}
    others = {line for line in text.splitlines() if line.startswith("vllm:")}
    assert {line.replace("opsin:", "vllm:") for line in own} == others
    assert any(line.startswith("vllm:num_requests_running{") for line in others)
    assert "process_resident_memory_bytes" in text


def test_the_fingerprint_is_the_models(server: Running) -> None:
    client = server.client()
    first = client.chat.completions.create(model="golden", messages=user("Hello"), max_tokens=2)
    stream = client.chat.completions.create(model="golden", messages=user("Hello"), max_tokens=2, stream=True)
    found = {first.system_fingerprint, *(chunk.system_fingerprint for chunk in stream)}
    found.add(client.completions.create(model="golden", prompt="Hello", max_tokens=2).system_fingerprint)
    [fingerprint] = found
    assert fingerprint is not None
    with running(golden_config(quantization="int8")) as other:
        answer = other.client().chat.completions.create(model=MODEL, messages=user("Hello"), max_tokens=2)
    assert answer.system_fingerprint != fingerprint
