"""The error table: each case with its status, over a real socket; the server goes on afterwards."""

from __future__ import annotations

import base64
import json
import re
import socket
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from opsin.fetch.settings import FetchSettings
from opsin.server.answers import chat as module
from opsin.server.settings import RequestLimits, ServerSettings
from tests.server.asset_server import AssetServer, asset_server
from tests.server.in_thread import Running, golden_config, running
from tests.server.messages import CAT, IMAGES, data_url, image, text, user
from tests.server.pictures import claims_to_be_huge, picture

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = user("Hello")
SECRET = "do-not-repeat-me"


@pytest.fixture(scope="module")
def assets() -> Iterator[AssetServer]:
    with asset_server() as started:
        yield started


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "max_tokens": 2, **fields}


def check(response: requests.Response, status: int, param: str | None = None, says: str = "") -> None:
    """One body for all errors; nothing in it that helps an attacker."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert re.search(says, error["message"]), error["message"]
    if param is not None:
        assert error["param"] == param
    for leak in (SECRET, "Traceback", "site-packages", "/home", "/root", "object at 0x", "PIL", "torch"):
        assert leak not in response.text
    assert not re.search("0x[0-9a-fA-F]{4}", response.text)


@pytest.fixture(autouse=True)
def _works_afterwards(server: Running) -> Iterator[None]:
    yield
    assert server.post(CHAT, chat()).status_code == 200


# --------------------------------------------------------------------------------------------------
# 404: unknown model, path
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETE, "/v1/embeddings", "/tokenize", "/detokenize"])
def test_unknown_model(server: Running, path: str) -> None:
    body = {
        CHAT: {"messages": HELLO},
        COMPLETE: {"prompt": "x"},
        "/v1/embeddings": {"input": "x"},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [1]},
    }[path]
    check(server.post(path, {**body, "model": SECRET}), 404, "model", "served: golden, golden-too")


def test_unknown_path_and_method(server: Running) -> None:
    check(server.get("/v1/nothing"), 404)
    check(server.get(CHAT), 405)


def test_every_served_name_works(server: Running) -> None:
    for name in ("golden", "golden-too", None):
        answer = server.post(CHAT, chat(model=name))
        assert answer.json()["model"] == (name or "golden")


# --------------------------------------------------------------------------------------------------
# 400: malformed
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": ' + SECRET.encode() + b"}",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": '
        + b'{"a":' * 5000
        + b"1"
        + b"}" * 5000
        + b"}",
    ],
)
def test_malformed_bodies(server: Running, body: bytes) -> None:
    response = requests.post(
        server.url + CHAT, data=body, headers={"Content-Type": "application/json"}, timeout=30
    )
    check(response, 400)


def test_other_content_types(server: Running) -> None:
    response = requests.post(server.url + CHAT, data=json.dumps(chat()), timeout=30)
    check(response, 415, says="application/json")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", ""),
        ({"messages": SECRET}, "messages", "array"),
        ({"messages": [SECRET]}, "messages[0]", ""),
        ({"messages": [{"role": SECRET, "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", ""),
        ({"messages": [{"role": "user", "content": "x", SECRET[:3]: 1}]}, None, "unknown field"),
        ({"messages": user({"type": SECRET})}, "messages[0].content[0]", "expected one of 'text'"),
        ({"messages": user({"text": "x"})}, "messages[0].content[0]", "expected one of"),
        ({"messages": user({"type": "text"})}, "messages[0].content[0].text", "required"),
        (
            {"messages": user({"type": "image_url", "image_url": f"http://{SECRET}"})},
            "messages[0].content[0].image_url",
            "bare string",
        ),
        (
            {"messages": user({"type": "image_url", "image_url": {"url": 5}})},
            "messages[0].content[0].image_url.url",
            "string",
        ),
        ({"messages": user({**text("x"), "min_pixels": 5})}, "messages[0].content[0].min_pixels", "unknown"),
        (
            {"messages": user({**image("data:,x"), "max_pixels": 5})},
            "messages[0].content[0]",
            "max_pixels: a part has no size of its own; mm_processor_kwargs",
        ),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"logprobs": 3}, "logprobs", ""),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "20"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        ({"n": 0}, "n", ""),
        ({"n": 5}, "n", "at most 4"),
        ({"n": 10**30}, "n", ""),
        ({"best_of": 5}, "best_of", "at most 4"),
        ({"best_of": 2, "n": 3}, "best_of", "smaller"),
        ({"best_of": 3, "stream": True}, "stream", ""),
        ({"use_beam_search": True, "stream": True}, "stream", ""),
        ({"use_beam_search": True, "stop": "x"}, "use_beam_search", ""),
        ({"use_beam_search": True, "prompt_logprobs": 1}, "use_beam_search", "prompt_logprobs"),
        ({"length_penalty": 1.5}, "length_penalty", "use_beam_search"),
        ({"stop": list("abcde")}, "stop", "at most 4"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stop": ""}, "stop", "non-empty"),
        ({"stop": 5}, "stop", "non-empty"),
        ({"seed": 2**63}, "seed", ""),
        ({"seed": -(2**63) - 1}, "seed", ""),
        ({"seed": 1.5}, "seed", ""),
        ({"max_tokens": 0}, "max_tokens", ""),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"min_tokens": 3}, None, "min_tokens"),
        ({"temperature": -0.1}, "temperature", ""),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", ""),
        ({"top_p": 1.01}, "top_p", ""),
        ({"top_k": -2}, "top_k", ""),
        ({"min_p": 2}, "min_p", ""),
        ({"presence_penalty": 3}, "presence_penalty", ""),
        ({"frequency_penalty": -3}, "frequency_penalty", ""),
        ({"repetition_penalty": 0}, "repetition_penalty", ""),
        ({"logit_bias": {"608": 1}}, "logit_bias", "out of vocabulary"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {SECRET: 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, None, "100"),
        ({"stop_token_ids": [608]}, "stop_token_ids", "out of vocabulary"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "out of vocabulary"),
        ({"cache_salt": ""}, "cache_salt", ""),
        ({"priority": 5}, "priority", "--scheduling-policy priority"),
        ({"functions": []}, "functions", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"zzz": SECRET}, "zzz", "unknown field"),
        ({"chat_template": "{{ messages }}"}, "chat_template", "--trust-request-chat-template"),
        ({"chat_template_kwargs": {"tokenize": True}}, None, "tokenize"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "only one",
        ),
        ({"mm_processor_kwargs": {"pixels": 1}}, None, "max_pixels"),
        ({"messages": user(*[text("x")] * 21)}, "messages", "at most 20 content parts"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "'json_object'"),
        ({"guided_choice": []}, None, "at least one text"),
        ({"guided_json": {}, "guided_regex": "a"}, None, "only one of them"),
        ({"structured_outputs": {}}, None, "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, None, "exactly one"),
        ({"guided_regex": "("}, None, "not valid"),
        ({"guided_grammar": "what is this"}, None, "not valid"),
        ({"guided_json": {"type": SECRET[:3]}}, None, "not valid"),
        ({"guided_json": "{"}, None, "not valid"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "always"}, "tool_choice", "required"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", ""),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a"}}],
                "tool_choice": {"type": "function", "function": {"name": "b"}},
            },
            "tool_choice",
            "not among",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a"}}],
                "tool_choice": "required",
                "guided_regex": "a",
            },
            None,
            "already constrains",
        ),
    ],
)
def test_schema(server: Running, fields: Any, param: str | None, says: str) -> None:
    check(server.post(CHAT, chat(**fields)), 400, param, says)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "required"),
        ({"prompt": ""}, "none of them empty"),
        ({"prompt": []}, "none of them empty"),
        ({"prompt": [[]]}, "none of them empty"),
        ({"prompt": [608]}, "out of vocabulary"),
        ({"prompt": [-1]}, "out of vocabulary"),
        ({"prompt": [2**70]}, "out of vocabulary"),
        ({"prompt": ["a"] * 9}, "at most 8 prompts"),
        ({"prompt": "a", "max_tokens": 0}, "echo=true"),
        ({"prompt": "a", "logprobs": 21}, "20"),
        ({"prompt": "a", "suffix": "b"}, "not supported"),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "-1"),
        ({"prompt": "a", "truncate_prompt_tokens": 2049}, "2048"),
        ({"prompt": "a", "mm_processor_kwargs": {"max_pixels": 5}}, "chat"),
        ({"prompt": "<|image_pad|>"}, "placeholder"),
    ],
)
def test_completions(server: Running, fields: Any, says: str) -> None:
    check(server.post(COMPLETE, fields), 400, says=says)


def test_tokens_out_of_vocabulary(server: Running) -> None:
    check(server.post("/detokenize", {"tokens": [608]}), 400, "tokens", "0 to 607")
    check(server.post("/tokenize", {}), 400, says="either")


def test_many_errors_are_capped(server: Running) -> None:
    response = server.post(CHAT, {"messages": [{"role": SECRET}] * 500})
    check(response, 400, says="and 495 more")
    assert len(response.text) < 2000


def test_streamed_requests_get_the_same_errors(server: Running) -> None:
    check(server.post(CHAT, chat(stream=True, n=5)), 400, "n")
    check(server.post(CHAT, chat(stream=True, guided_regex="(")), 400, says="not valid")
    check(server.post(COMPLETE, {"prompt": [608], "stream": True}), 400, says="out of vocabulary")


# --------------------------------------------------------------------------------------------------
# 400: pictures and the context
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_earlier_messages", [False, True])
def test_too_many_images(server: Running, in_earlier_messages: bool) -> None:
    part = image(data_url(CAT))
    messages = user(part, part, part, part)
    if in_earlier_messages:
        messages = [*user(part, part), {"role": "assistant", "content": "Yes."}, *user(part, part)]
    says = re.escape("At most 3 image(s) may be provided in one request.")
    says += ".*earlier messages included.*--limit-mm-per-prompt image=4"
    check(server.post(CHAT, chat(messages=messages)), 400, says=says)
    check(server.post(CHAT, chat(messages=messages, stream=True)), 400, says=says)


def test_too_many_videos(server: Running) -> None:
    part = {"type": "video", "video": [data_url(CAT)] * 2}
    says = r"At most 1 video\(s\) may be provided in one request.*--limit-mm-per-prompt video=2"
    check(server.post(CHAT, chat(messages=user(part, part))), 400, says=says)


@pytest.mark.parametrize("stream", [False, True])
def test_longer_than_the_context_after_expansion(server: Running, stream: bool) -> None:
    words = "\n0" * 1005
    assert server.post(CHAT, chat(messages=user(words))).status_code == 200
    messages = user(image(data_url(CAT)), text(words))
    check(
        server.post(CHAT, chat(messages=messages, stream=stream)),
        400,
        says=r"the prompt has at least \d+ tokens.*2048",
    )


def test_longer_than_the_context_in_completions(server: Running) -> None:
    check(server.post(COMPLETE, {"prompt": [7] * 2048}), 400, says="2048 tokens.*2048")


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,!!!!",
        "data:image/png;base64",
        "data:,",
        "data:image/png;base64,",
        data_url(b"not a picture at all"),
        data_url((IMAGES / CAT).read_bytes()[:-20_000]),
        data_url(picture(format="PPM")),
        data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),
        data_url(claims_to_be_huge()),
        data_url(picture((1, 400))),
        "relative/path.png",
        "/etc/passwd",
        "",
    ],
    ids=lambda url: url[:30],
)
def test_pictures_that_cannot_be_used(server: Running, url: str) -> None:
    check(server.post(CHAT, chat(messages=user(image(url), text("?")))), 400)


def test_a_modality_the_model_lacks_is_named(server: Running) -> None:
    part = {"type": "image_embeds", "image_embeds": base64.b64encode(b"x").decode()}
    check(server.post(CHAT, chat(messages=user(part))), 400, says="--enable-mm-embeds")


# --------------------------------------------------------------------------------------------------
# 403, 422, 502, 504: fetching
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("upstream", "status"),
    [(404, 422), (401, 422), (408, 502), (429, 502), (500, 502), (503, 502)],
)
def test_upstream_errors(
    server: Running, assets: AssetServer, upstream: int, status: int, stream: bool
) -> None:
    url = assets.put("/x.png", SECRET.encode(), upstream)
    check(server.post(CHAT, chat(messages=user(image(url)), stream=stream)), status, "image_url")


def test_upstream_is_no_picture(server: Running, assets: AssetServer) -> None:
    url = assets.put("/page", b"<html>" + SECRET.encode() + b"</html>", content_type="image/png")
    check(server.post(CHAT, chat(messages=user(image(url)))), 422, "image_url")


def test_no_such_host(server: Running) -> None:
    url = "http://no-such-host.invalid/x.png"
    check(server.post(CHAT, chat(messages=user(image(url)))), 502, "image_url")


def test_deadline_names_host_limit_and_variable(server: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.png"
        response = server.post(CHAT, chat(messages=user(image(url))))
    check(response, 504, "image_url", says=r"127\.0\.0\.1.*1.*OPSIN_IMAGE_FETCH_TIMEOUT")


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/x.png",
        "http://[fd00::1]/x.png",
        "http://[::ffff:10.0.0.1]/x.png",
        "http://user:word@127.0.0.1/x.png",
        "ftp://example.com/x.png",
        "gopher://127.0.0.1/x",
        "file:///etc/passwd",
    ],
)
def test_urls_that_are_not_allowed(server: Running, url: str) -> None:
    check(server.post(CHAT, chat(messages=user(image(url)))), 403)


# --------------------------------------------------------------------------------------------------
# 413, 429, 500
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_body_too_large(server: Running, announced: bool) -> None:
    body = json.dumps(chat(messages=user("x" * 9 * 2**20))).encode()
    data = body if announced else iter([body[start : start + 2**16] for start in range(0, len(body), 2**16)])
    response = requests.post(
        server.url + CHAT, data=data, headers={"Content-Type": "application/json"}, timeout=30
    )
    check(response, 413, says=str(8 * 2**20))


def test_body_that_only_claims_to_be_large(server: Running) -> None:
    """The answer does not wait for what may never come."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=30) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {10**15}\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    server.wait_idle()


def test_internal_error_shows_only_its_id(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError(f"{SECRET} at <object at 0x7f0011223344>")

    monkeypatch.setattr(server.engine.frontend.renderer, "render", broken)
    for stream in (False, True):
        response = server.post(CHAT, chat(stream=stream), headers={"X-Request-Id": "known-id"})
        check(response, 500, says="known-id")
    assert SECRET in caplog.text
    assert "request known-id failed" in caplog.text
    monkeypatch.undo()


def test_error_in_the_middle_of_a_stream(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module.chat_logprobs
    calls = iter(range(100))

    def breaks(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError(SECRET)
        return made(*arguments)

    monkeypatch.setattr(module, "chat_logprobs", breaks)
    response = server.post(CHAT, chat(stream=True, logprobs=True, max_tokens=50, ignore_eos=True))
    assert response.status_code == 200
    *_, last, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == HTTPStatus.INTERNAL_SERVER_ERROR
    assert SECRET not in response.text
    monkeypatch.undo()


def test_full_queue(server: Running) -> None:
    config = golden_config(max_num_seqs=1)
    settings = ServerSettings(
        limits=RequestLimits(max_waiting=1), fetch=FetchSettings(allow_loopback_media=True)
    )
    with running(config, settings) as small:
        long = chat(max_tokens=1900, ignore_eos=True, stream=True)
        busy = requests.post(small.url + CHAT, json=long, stream=True, timeout=60)
        with small.app.admission.ticket() as held:
            held.admit()
            response = small.post(CHAT, chat())
            check(response, 429, says="queue is full")
            assert int(response.headers["Retry-After"]) >= 1
            assert small.get("/health").status_code == 200
            assert small.get("/v1/models").status_code == 200
        busy.close()
        small.wait_idle()
        assert small.post(CHAT, chat()).status_code == 200
        assert small.engine.stats().kv_blocks_used == 0
