"""`LLM.chat` fetches http(s) URLs, by the rules of the server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from opsin import LLM, SamplingParams
from opsin.errors import FetchError, MediaError, RequestError
from opsin.fetch.library import default_settings, fetched
from opsin.fetch.settings import FetchSettings
from opsin.inputs.conversation import Conversation
from tests.models.golden import GOLDEN
from tests.server.asset_server import asset_server
from tests.server.pictures import picture

PICTURE = picture()
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
HERE = FetchSettings(allow_loopback_media=True)


def asked(url: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with asset_server() as server:
        yield server.put("/a.png", PICTURE, content_type="image/png")


def load(**settings: Any) -> LLM:
    return LLM(
        str(GOLDEN / "qwen2vl" / "model"), dtype="float32", device="cpu", kv_cache_memory=2**22, **settings
    )


def test_a_picture_by_url_is_the_picture(url: str) -> None:
    from base64 import b64encode

    data = f"data:image/png;base64,{b64encode(PICTURE).decode()}"
    with load(fetch_urls=HERE) as llm:
        by_url, by_data = llm.chat([asked(url), asked(data)], PARAMS, use_tqdm=False)
        assert by_url.prompt_token_ids == by_data.prompt_token_ids
        assert by_url.outputs[0].token_ids == by_data.outputs[0].token_ids
        assert llm.chat(asked(url), PARAMS, use_tqdm=False)[0].outputs[0].token_ids


def test_the_servers_rules_hold(url: str) -> None:
    """No private address, unless it is named; one bad request harms no other."""
    with load() as llm:
        with pytest.raises(FetchError, match="is not on the public internet") as caught:
            llm.chat(asked(url), PARAMS, use_tqdm=False)
        assert caught.value.status == 403
        text = [{"role": "user", "content": "Hello"}]
        bad, good = llm.chat([asked(url), text], PARAMS, use_tqdm=False, on_error="return")
        assert isinstance(bad.error, RequestError)
        assert good.error is None


def test_the_switch(url: str) -> None:
    with load(fetch_urls=False) as llm, pytest.raises(MediaError, match="not with fetch_urls=False"):
        llm.chat(asked(url), PARAMS, use_tqdm=False)


def test_only_hosts_that_are_named(url: str) -> None:
    refused = pytest.raises(FetchError, match="not among the domains")
    with load(fetch_urls=HERE, allowed_media_domains=["pictures.example"]) as llm, refused:
        llm.chat(asked(url), PARAMS, use_tqdm=False)
    with load(fetch_urls=HERE, allowed_media_domains=["127.0.0.1"]) as llm:
        assert llm.chat(asked(url), PARAMS, use_tqdm=False)[0].error is None


def test_files_and_objects_stay(url: str) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "file:///nowhere.png"}},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "image": "/some/path.png"},
        {"type": "video", "video": [url, url]},
    ]
    conversation = Conversation.parse([{"role": "user", "content": parts}])
    values = [part.value for part in fetched(conversation, HERE).media]
    assert values == ["file:///nowhere.png", PICTURE, "/some/path.png", [PICTURE, PICTURE]]


def test_inside_a_running_loop(url: str) -> None:
    """As in a notebook."""

    async def cell() -> Any:
        return fetched(Conversation.parse(asked(url)), HERE).media[0].value

    assert asyncio.run(cell()) == PICTURE


def test_without_what_fetches(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opsin.fetch.fetcher")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "opsin.fetch.pinned_http", raising=False)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MediaError, match=r'pip install "opsin\[serve\]"'):
        fetched(Conversation.parse(asked(url)), HERE)


def test_time_outs_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_settings(10).image_fetch_timeout == 5
    assert default_settings(10).max_media_bytes == 10
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", "7")
    assert default_settings(10).image_fetch_timeout == 7
    monkeypatch.setenv("OPSIN_IMAGE_FETCH_TIMEOUT", "9")
    assert default_settings(10).image_fetch_timeout == 9
