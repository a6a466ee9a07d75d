"""Fetching for `opsin.LLM`: http(s) URLs in chats, by the rules of the server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from opsin.errors import MediaError
from opsin.fetch.settings import FetchSettings
from opsin.inputs.conversation import Conversation, MediaPart

_TIMEOUTS = ("OPSIN_IMAGE_FETCH_TIMEOUT", "VLLM_IMAGE_FETCH_TIMEOUT")


def default_settings(max_media_bytes: int) -> FetchSettings:
    """The server's defaults, with the time-out that the environment says.

    Raises:
        ConfigError: the environment says something that is no time.
    """
    given = next((os.environ[name] for name in _TIMEOUTS if name in os.environ), None)
    if given is None:
        return FetchSettings(max_media_bytes=max_media_bytes)
    return FetchSettings(max_media_bytes=max_media_bytes, image_fetch_timeout=float(given))


def fetched(conversation: Conversation, settings: FetchSettings) -> Conversation:
    """A conversation whose http(s) URLs have become content; files and everything else stay.

    Args:
        conversation: of a chat.
        settings: what is allowed.

    Raises:
        FetchError: a URL may not or cannot be fetched.
        MediaError: what fetches is not installed, or content is too large.
    """
    if not any(names_url(part) for part in conversation.media):
        return conversation
    try:
        from opsin.fetch.fetcher import MediaFetcher
    except ModuleNotFoundError as error:
        raise MediaError(
            f'fetching URLs needs {error.name}: pip install "opsin[serve]", or pass content instead of URLs'
        ) from None

    async def fetch() -> Conversation:
        fetcher = MediaFetcher(settings)
        try:
            return await fetcher.resolve(conversation, names_url)
        finally:
            await fetcher.aclose()

    found: Conversation = _run(fetch)
    return found


def names_url(part: MediaPart) -> bool:
    """Whether a part, or one of its frames, is at an http(s) URL."""
    return any(
        isinstance(value, str) and value[:8].lower().startswith(("http://", "https://"))
        for value in _values(part.value)
    )


def _values(value: Any) -> list[Any]:
    if isinstance(value, tuple) and value:  # frames and their times
        return _values(value[0])
    return value if isinstance(value, list) else [value]


def _run(work: Callable[[], Any]) -> Any:
    """Run a coroutine to its end, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(work())).result()
