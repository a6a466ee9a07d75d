"""`opsin.fetch`: what the assets behind URLs answer, how much of it is read, and for how long."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import pytest

from opsin.errors import ConfigError, FetchError, MediaError
from opsin.fetch.fetcher import MediaFetcher
from opsin.fetch.settings import FetchSettings
from opsin.inputs.conversation import Conversation
from tests.server.asset_server import Asset, AssetServer, asset_server
from tests.server.pictures import gif, picture

PICTURE = picture()
MP4 = b"\0\0\0\x18ftypmp42" + bytes(20)


@pytest.fixture
def assets() -> Iterator[AssetServer]:
    with asset_server() as server:
        yield server


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def resolved(messages: Sequence[Any], **settings: Any) -> list[Any]:
    """The values of all media parts, in order."""
    conversation = Conversation.parse(messages)

    async def resolve() -> Conversation:
        fetcher = MediaFetcher(FetchSettings(**{"allow_loopback_media": True, **settings}))
        try:
            return await fetcher.resolve(conversation)
        finally:
            await fetcher.aclose()

    found = asyncio.run(resolve())
    assert [replace(part, value=None) for part in found.media] == [
        replace(part, value=None) for part in conversation.media
    ], "nothing but values changes"
    return [part.value for part in found.media]


def refusal(*parts: Any, **settings: Any) -> FetchError:
    with pytest.raises(FetchError) as caught:
        resolved([user(*parts)], **settings)
    return caught.value


# --- what becomes of messages ---------------------------------------------------------------------


def test_urls_become_content_and_all_else_stays(assets: AssetServer) -> None:
    red, blue = assets.put("/red.png", PICTURE), assets.put("/blue.gif", gif(3))
    film = assets.put("/film.mp4", MP4)
    text = {"type": "text", "text": "What is this?"}
    inline = image("data:image/png;base64,AAAA")
    messages = [
        {"role": "system", "content": "http://not.fetched.example/a.png"},
        user(image(red), text, inline, {"type": "input_image", "image_url": blue}, video(film)),
        {"role": "assistant", "content": None, "tool_calls": []},
        user(
            {"type": "video", "video": [red, "data:,x", blue]}, video(blue), {"type": "image", "image": red}
        ),
    ]
    content = [PICTURE, "data:image/png;base64,AAAA", gif(3), MP4]
    assert resolved(messages) == [*content, [PICTURE, "data:,x", gif(3)], gif(3), PICTURE]
    assert messages[1]["content"][0] == image(red), "the caller's messages are not changed"
    # Once for each URL and use: blue is named as a picture and as a video.
    assert sorted(path for path, _ in assets.seen) == ["/blue.gif", "/blue.gif", "/film.mp4", "/red.png"]


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "expected"),
    [(code, HTTPStatus.UNPROCESSABLE_ENTITY) for code in (400, 401, 403, 404, 410, 418, 451, 304, 300)]
    + [(code, HTTPStatus.BAD_GATEWAY) for code in (500, 502, 503, 504, 599, 408, 429)],
)
def test_error_statuses(assets: AssetServer, status: int, expected: HTTPStatus) -> None:
    error = refusal(image(assets.put("/a.png", PICTURE, status)))
    assert error.status == expected
    assert str(error) == f"messages[0].content[0]: '127.0.0.1' answered with status {status}"
    assert error.param == "image_url"
    assert refusal(video(assets.url("/a.png"))).param == "video_url"


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"<!doctype html>" + b" " * 1000, b"%!PS-Adobe-3.0", MP4]
)
def test_what_is_no_picture_whatever_the_header_says(assets: AssetServer, content: bytes) -> None:
    error = refusal(image(assets.put("/a.png", content, Content_Type="image/png")))
    assert error.status == HTTPStatus.UNPROCESSABLE_ENTITY
    assert str(error) == "messages[0].content[0]: the URL answers with something that is no image"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_what_is_a_picture_whatever_the_header_says(assets: AssetServer, format: str) -> None:
    content = picture(format=format)
    assert resolved([user(image(assets.put("/a", content, Content_Type="text/html")))]) == [content]


def test_a_page_is_not_read_to_its_end(assets: AssetServer) -> None:
    written = 0

    def endless(connection: Any, closing: threading.Event) -> None:
        nonlocal written
        while not closing.is_set():
            connection.write(b"<p>and on</p>" * 1000)
            written += 13000

    assets.assets["/page"] = Asset(stream=endless)
    assert refusal(image(assets.url("/page"))).status == HTTPStatus.UNPROCESSABLE_ENTITY
    assert written < 32 * 2**20


def test_compressed_content_is_refused(assets: AssetServer) -> None:
    error = refusal(image(assets.put("/a.png", PICTURE, Content_Encoding="gzip")))
    assert error.status == HTTPStatus.UNPROCESSABLE_ENTITY
    [(_, headers)] = assets.seen
    assert headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("claimed", ["1000", "5"])
def test_content_of_another_length_than_the_header_says(assets: AssetServer, claimed: str) -> None:
    """Longer than it is: the connection ends early. Shorter: the rest is not content."""
    assets.assets["/a.png"] = Asset(
        headers={"Content-Length": claimed}, stream=lambda connection, _: connection.write(PICTURE)
    )
    error = refusal(image(assets.url("/a.png")))
    assert error.status in (HTTPStatus.BAD_GATEWAY, HTTPStatus.UNPROCESSABLE_ENTITY)


def test_what_is_not_http(assets: AssetServer) -> None:
    # An https URL of an http server, and headers that are none.
    assert refusal(image(assets.url("/a").replace("http:", "https:"))).status == HTTPStatus.BAD_GATEWAY
    assets.put("/b", PICTURE, **{"X-Long": "x" * 200_000})
    assert refusal(image(assets.url("/b"))).status == HTTPStatus.BAD_GATEWAY


# --- limits ---------------------------------------------------------------------------------------


def test_bytes_of_one_item_are_capped_while_they_come(assets: AssetServer) -> None:
    written = 0

    def endless(connection: Any, closing: threading.Event) -> None:
        nonlocal written
        connection.write(PICTURE)
        while not closing.is_set():
            connection.write(bytes(10_000))
            written += 10_000

    assets.assets["/a.png"] = Asset(stream=endless)
    with pytest.raises(MediaError, match=r"content\[0\]: the file is too large; at most 100000 bytes"):
        resolved([user(image(assets.url("/a.png")))], max_media_bytes=100_000)
    assert written < 32 * 2**20


def test_bytes_of_one_request_are_capped(assets: AssetServer) -> None:
    urls = [assets.put(f"/{index}.png", PICTURE + bytes(5_000)) for index in range(4)]
    with pytest.raises(MediaError, match="the media of a request are too large; at most 15000 bytes"):
        resolved([user(*map(image, urls))], max_request_media_bytes=15_000)
    assert len(resolved([user(*map(image, urls[:2]))], max_request_media_bytes=15_000)) == 2
    assert len(resolved([user(*[image(urls[0])] * 9)], max_request_media_bytes=15_000)) == 9, (
        "one URL, one content"
    )


@pytest.mark.parametrize("begins", [b"", PICTURE])
def test_the_deadline_is_for_everything_together(assets: AssetServer, begins: bytes) -> None:
    """A byte now and then keeps every single read alive."""

    def drip(connection: Any, closing: threading.Event) -> None:
        connection.write(begins)
        while not closing.wait(0.02):
            connection.write(b"\0")
            connection.flush()

    assets.assets["/a.png"] = Asset(stream=drip)
    error = refusal(image(assets.url("/a.png")), image_fetch_timeout=0.25)
    if begins:
        assert error.status == HTTPStatus.GATEWAY_TIMEOUT
        assert str(error) == (
            "messages[0].content[0]: fetching from '127.0.0.1' was not done within 0.25 s; "
            "--image-fetch-timeout or OPSIN_IMAGE_FETCH_TIMEOUT sets it"
        )
    else:  # after 16 zeros it is known to be no picture
        assert error.status in (HTTPStatus.GATEWAY_TIMEOUT, HTTPStatus.UNPROCESSABLE_ENTITY)


def test_the_deadline_covers_headers_that_do_not_come(assets: AssetServer) -> None:
    def silent(path: str) -> str:
        assets.assets[path] = Asset(headers=_Slow(assets.closing))
        return assets.url(path)

    assert refusal(image(silent("/a.png")), image_fetch_timeout=0.2).status == HTTPStatus.GATEWAY_TIMEOUT


class _Slow(dict[str, str]):
    """Headers that come when the test is over."""

    def __init__(self, closing: threading.Event) -> None:
        super().__init__()
        self._closing = closing

    def items(self) -> Any:
        self._closing.wait(30)
        return super().items()


def test_the_deadline_covers_the_resolver_and_redirects() -> None:
    async def stuck(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        raise AssertionError

    async def fetch() -> None:
        fetcher = MediaFetcher(FetchSettings(image_fetch_timeout=0.1), resolver=stuck)
        await fetcher.resolve(Conversation.parse([user(image("http://pictures.example/a.png"))]))

    with pytest.raises(FetchError, match=r"'pictures\.example' was not done within 0\.1 s") as caught:
        asyncio.run(fetch())
    assert caught.value.status == HTTPStatus.GATEWAY_TIMEOUT


# --- together -------------------------------------------------------------------------------------


class _Gate:
    """Assets that answer when all who may come at once are there."""

    def __init__(self, assets: AssetServer, wanted: int) -> None:
        self._lock = threading.Lock()
        self._here = 0
        self.most = 0
        self._full = threading.Event()
        self._wanted = wanted
        self._assets = assets

    def put(self, path: str) -> str:
        def answer(connection: Any, closing: threading.Event) -> None:
            with self._lock:
                self._here += 1
                self.most = max(self.most, self._here)
                if self._here >= self._wanted:
                    self._full.set()
            self._full.wait(10)
            time.sleep(0.05)  # for one too many to show itself
            with self._lock:
                self._here -= 1
            connection.write(PICTURE)

        self._assets.assets[path] = Asset(stream=answer)
        return self._assets.url(path)


def test_fetches_of_a_request_run_together_but_not_all(assets: AssetServer) -> None:
    gate = _Gate(assets, 3)
    urls = [gate.put(f"/{index}.png") for index in range(9)]
    assert resolved([user(*map(image, urls))], max_concurrent_per_request=3) == [PICTURE] * 9
    assert gate.most == 3


def test_fetches_of_all_requests_are_bounded(assets: AssetServer) -> None:
    gate = _Gate(assets, 4)

    async def many() -> None:
        fetcher = MediaFetcher(
            FetchSettings(allow_loopback_media=True, max_concurrent=4, max_concurrent_per_request=2)
        )
        requests = [
            [user(*[image(gate.put(f"/{number}/{index}.png")) for index in range(3)])] for number in range(4)
        ]
        await asyncio.gather(*[fetcher.resolve(Conversation.parse(messages)) for messages in requests])
        await fetcher.aclose()

    asyncio.run(many())
    assert gate.most == 4


def test_the_first_failure_ends_the_others(assets: AssetServer) -> None:
    """And so does a client that goes away."""
    begun, gone = threading.Event(), threading.Event()

    def endless(connection: Any, closing: threading.Event) -> None:
        begun.set()
        connection.write(PICTURE)
        try:
            while not closing.wait(0.01):
                connection.write(bytes(10_000))
        except OSError:
            gone.set()

    def no_picture(connection: Any, closing: threading.Event) -> None:
        begun.wait(30)  # or there would be nothing to end
        connection.write(b"no picture")

    assets.assets["/slow.png"] = Asset(stream=endless)
    assets.assets["/bad.png"] = Asset(stream=no_picture)
    slow, bad = assets.url("/slow.png"), assets.url("/bad.png")
    error = refusal(
        image(slow), image(bad), image_fetch_timeout=30, max_media_bytes=2**40, max_request_media_bytes=2**40
    )
    assert str(error).startswith("messages[0].content[1]: ")
    assert gone.wait(30), "the connection of the other fetch was closed"

    async def cancelled() -> None:
        fetcher = MediaFetcher(
            FetchSettings(allow_loopback_media=True, max_media_bytes=2**40, max_request_media_bytes=2**40)
        )
        task = asyncio.create_task(fetcher.resolve(Conversation.parse([user(image(slow))])))
        while len(assets.seen) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await fetcher.aclose()

    gone.clear()
    asyncio.run(cancelled())
    assert gone.wait(10)


def test_settings_that_cannot_be() -> None:
    for wrong in (
        {"max_media_bytes": 0},
        {"max_concurrent": 0},
        {"image_fetch_timeout": 0.0},
        {"image_fetch_timeout": float("inf")},
    ):
        with pytest.raises(ConfigError, match="expected"):
            FetchSettings(**wrong)  # type: ignore[arg-type]
