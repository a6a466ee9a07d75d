"""``file://`` URLs: nothing but readable pictures in the shared folder, whatever links and dots say."""

from __future__ import annotations

import asyncio
import os
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from opsin.errors import ConfigError, FetchError, MediaError
from opsin.fetch.fetcher import MediaFetcher
from opsin.fetch.settings import FetchSettings
from opsin.inputs.conversation import Conversation
from tests.server.pictures import picture

PICTURE = picture()


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A shared folder with a picture, and beside it a secret one."""
    folder = tmp_path / "shared"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.png").write_bytes(PICTURE)
    (folder / "deep" / "ä b.png").write_bytes(PICTURE)
    (tmp_path / "secret.png").write_bytes(PICTURE)
    (tmp_path / "shared-not").mkdir()
    (tmp_path / "shared-not" / "secret.png").write_bytes(PICTURE)
    return folder


def read(url: str, root: Path | None, **settings: Any) -> bytes:
    async def fetch() -> bytes:
        fetcher = MediaFetcher(FetchSettings(allowed_local_media_path=root, **settings))
        part = {"type": "image_url", "image_url": {"url": url}}
        conversation = Conversation.parse([{"role": "user", "content": [part]}])
        content: bytes = (await fetcher.resolve(conversation)).media[0].value
        await fetcher.aclose()
        return content

    return asyncio.run(fetch())


@pytest.mark.parametrize(
    "path", ["a.png", "deep/%C3%A4%20b.png", "deep/../a.png", "./a.png", "deep//../a.png"]
)
@pytest.mark.parametrize("prefix", ["file://", "FILE://", "file://localhost"])
def test_files_of_the_shared_folder(shared: Path, path: str, prefix: str) -> None:
    assert read(f"{prefix}{shared}/{path}", shared) == PICTURE


def test_without_the_flag_no_file_is_read(shared: Path) -> None:
    with pytest.raises(FetchError, match="--allowed-local-media-path") as caught:
        read(f"file://{shared}/a.png", None)
    assert caught.value.status == HTTPStatus.FORBIDDEN


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "%2e%2e/secret.png",
        "deep/../../secret.png",
        "..%2fsecret.png",
        "../shared-not/secret.png",
        "../missing.png",
        "../../../../../../../../etc/passwd",
        "a.png%00.txt",
        "%ff.png",
        "a.png?x",
        "a.png#x",
    ],
)
def test_paths_that_lead_outside(shared: Path, path: str) -> None:
    """All with one answer, whether something is there or not."""
    with pytest.raises(FetchError, match=": the file:// URL does not lead into the folder") as caught:
        read(f"file://{shared}/{path}", shared)
    assert caught.value.status == HTTPStatus.FORBIDDEN
    assert str(shared) not in str(caught.value)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "file:a.png", "file://", "file://elsewhere/a.png"])
def test_urls_that_lead_elsewhere(shared: Path, url: str) -> None:
    with pytest.raises(FetchError) as caught:
        read(url, shared)
    assert caught.value.status == HTTPStatus.FORBIDDEN


def test_symbolic_links_are_followed_and_must_stay_inside(shared: Path) -> None:
    (shared / "out.png").symlink_to(shared.parent / "secret.png")
    (shared / "outside").symlink_to(shared.parent)
    (shared / "in.png").symlink_to("deep/ä b.png")
    (shared / "loop.png").symlink_to("loop.png")
    for name in ("out.png", "outside/secret.png", "outside/shared-not/secret.png"):
        with pytest.raises(FetchError, match="does not lead into") as caught:
            read(f"file://{shared}/{name}", shared)
        assert caught.value.status == HTTPStatus.FORBIDDEN
    assert read(f"file://{shared}/in.png", shared) == PICTURE
    assert read(f"file://{shared}/outside/shared/a.png", shared) == PICTURE
    with pytest.raises((FetchError, MediaError)):
        read(f"file://{shared}/loop.png", shared)


def test_the_shared_folder_may_be_a_link_itself(shared: Path) -> None:
    link = shared.parent / "link"
    link.symlink_to(shared)
    assert read(f"file://{link}/a.png", link) == PICTURE
    assert read(f"file://{shared}/a.png", link) == PICTURE


def test_what_is_no_readable_picture(shared: Path) -> None:
    (shared / ".env").write_text("KEY=secret")
    os.mkfifo(shared / "pipe.png")  # opening a pipe that nobody writes to would wait for ever
    (shared / "big.png").write_bytes(PICTURE + bytes(1000))
    expected = {
        "missing.png": "leads to nothing that can be read",
        "deep": "leads to nothing that can be read",
        "a" * 5000: "leads to nothing that can be read",
        "pipe.png": "leads to nothing that can be read",
        ".env": "leads to something that is no image",
        "big.png": "too large; at most 500 bytes",
    }
    for name, complaint in expected.items():
        with pytest.raises(MediaError, match=complaint) as caught:
            read(f"file://{shared}/{name}", shared, max_media_bytes=500)
        assert "secret" not in str(caught.value)
        assert str(shared) not in str(caught.value)


def test_the_shared_folder_has_to_exist(shared: Path) -> None:
    for path in (shared / "missing", shared / "a.png"):
        with pytest.raises(ConfigError, match="allowed_local_media_path=.* is not a folder"):
            FetchSettings(allowed_local_media_path=path)
