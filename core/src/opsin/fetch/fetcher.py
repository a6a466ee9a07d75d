"""Media that requests name by URL -> bytes, before the chat is rendered: concurrent, bounded, guarded."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from opsin.api import Modality
from opsin.errors import FetchError, MediaError
from opsin.fetch.embeds import decode_embeds
from opsin.fetch.gather import all_of
from opsin.fetch.local_file import read_local_file
from opsin.fetch.pinned_http import PinnedHTTP, Resolver, system_resolver
from opsin.fetch.settings import FetchSettings
from opsin.fetch.sniff import SNIFFED_BYTES, modality_of
from opsin.inputs.conversation import Conversation, MediaPart
from opsin.inputs.media import is_timed

T = TypeVar("T")
RunBlocking = Callable[..., Awaitable[Any]]
"""``await run_blocking(function, *arguments)``: `AsyncEngine.in_pool`, or `asyncio.to_thread`."""

_ACCEPT: Mapping[Modality, str] = {"image": "image/*", "video": "video/*, image/*"}


class MediaFetcher:
    """Fetches the media of requests. Belongs to one event loop; close it with `aclose`."""

    def __init__(
        self,
        settings: FetchSettings,
        *,
        run_blocking: RunBlocking = asyncio.to_thread,
        resolver: Resolver = system_resolver,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Set up; nothing is opened yet.

        Args:
            settings: what is allowed.
            run_blocking: runs the reading of files and the decoding of embeddings.
            resolver: as for `PinnedHTTP`.
            tls: as for `PinnedHTTP`.
        """
        self._settings = settings
        self._run_blocking = run_blocking
        self._slots = asyncio.Semaphore(settings.max_concurrent)
        self._http = PinnedHTTP(settings, resolver=resolver, tls=tls)

    async def resolve(
        self, conversation: Conversation, wanted: Callable[[MediaPart], bool] | None = None
    ) -> Conversation:
        """Put content in the place of URLs: the result needs neither network nor files.

        http(s) and ``file://`` URLs become bytes, embeddings become tensors; ``data:`` URLs stay, to be
        decoded where pictures are. A URL that a request names several times is fetched once. The first
        failure ends all fetches of the request. With ``wanted``, other parts stay as they are.

        Raises:
            FetchError: a URL may not or cannot be fetched.
            MediaError: content is too large or is no embeddings.
        """
        request = _Request(self._settings, self._run_blocking, self._http, self._slots)
        parts = [part for part in conversation.media if wanted is None or wanted(part)]
        try:
            found = iter(await all_of(request.value(part) for part in parts))
            return conversation.with_values(
                [next(found) if wanted is None or wanted(part) else part.value for part in conversation.media]
            )
        finally:
            request.cancel()

    async def aclose(self) -> None:
        """Close what is open."""
        await self._http.aclose()


class _Request:
    """The fetches of one request."""

    def __init__(
        self, settings: FetchSettings, run_blocking: RunBlocking, http: PinnedHTTP, slots: asyncio.Semaphore
    ) -> None:
        self._settings = settings
        self._run_blocking = run_blocking
        self._http = http
        self._slots = slots
        self._own_slots = asyncio.Semaphore(settings.max_concurrent_per_request)
        self._remaining_bytes = settings.max_request_media_bytes
        self._running: dict[tuple[str, Modality], asyncio.Task[bytes]] = {}

    async def value(self, part: MediaPart) -> Any:
        """The part's value, fetched where it has to be."""
        if part.is_embeds:
            return await self._at(part, f"{part.modality}_embeds", self._embeds(part.value))
        if is_timed(part.value):
            frames, timing = part.value
            return await self._content_of(part, frames), timing
        return await self._content_of(part, part.value)

    async def _content_of(self, part: MediaPart, value: Any) -> Any:
        if isinstance(value, list):  # frames
            return await all_of(self._content(part, "image", frame) for frame in value)
        return await self._content(part, part.modality, value)

    def cancel(self) -> None:
        """End the fetches that are no longer needed."""
        for task in self._running.values():
            if not task.cancel() and not task.cancelled():
                task.exception()  # else asyncio logs that nobody looked at it

    async def _at(self, part: MediaPart, param: str, result: Awaitable[T]) -> T:
        """The result; errors begin with the place and name the parameter."""
        try:
            return await result
        except FetchError as error:
            raise FetchError(error.status, f"{part.where}: {error}", param=param) from None
        except MediaError as error:
            raise MediaError(f"{part.where}: {error}") from None

    async def _content(self, part: MediaPart, modality: Modality, value: Any) -> Any:
        if not isinstance(value, str) or value[:5].lower() == "data:":
            return value
        key = (value, modality)
        if key not in self._running:
            self._running[key] = asyncio.ensure_future(self._fetch(value, modality))
        return await self._at(part, f"{modality}_url", self._running[key])

    async def _fetch(self, url: str, modality: Modality) -> bytes:
        scheme, colon, _ = url.partition(":")
        async with self._own_slots:
            if not (scheme and colon):
                raise MediaError("expected a data:, http:// or https:// URL")
            if scheme.lower() == "file":
                return await self._read_file(url, modality)
            async with self._slots:
                return await self._get(url, modality)

    async def _read_file(self, url: str, modality: Modality) -> bytes:
        folder, max_bytes = self._settings.allowed_local_media_path, self._settings.max_media_bytes
        content: bytes = await self._run_blocking(read_local_file, url, folder, max_bytes)
        self._spend(len(content))
        if not _looks_like(modality, content):
            raise MediaError(f"the file:// URL leads to something that is no {modality}")
        return content

    async def _get(self, url: str, modality: Modality) -> bytes:
        content, max_bytes = bytearray(), self._settings.max_media_bytes

        def check_kind() -> None:
            if not _looks_like(modality, content):
                raise FetchError(422, f"the URL answers with something that is no {modality}")

        def receive(piece: bytes) -> None:
            self._spend(len(piece))
            known = len(content) >= SNIFFED_BYTES
            content.extend(piece)
            if len(content) > max_bytes:
                raise MediaError(f"the file is too large; at most {max_bytes} bytes are accepted")
            if not known and len(content) >= SNIFFED_BYTES:
                check_kind()

        await self._http.get(url, receive=receive, accept=_ACCEPT[modality])
        check_kind()
        return bytes(content)

    async def _embeds(self, value: Any) -> Any:
        if not self._settings.enable_mm_embeds:
            raise MediaError(
                "this server takes no ready-made embeddings; --enable-mm-embeds would allow them"
            )
        tensors = await self._run_blocking(decode_embeds, value, self._settings.max_media_bytes)
        named = tensors.values() if isinstance(tensors, Mapping) else [tensors]
        self._spend(sum(tensor.nbytes for tensor in named))
        return tensors

    def _spend(self, num_bytes: int) -> None:
        self._remaining_bytes -= num_bytes
        if self._remaining_bytes < 0:
            most = self._settings.max_request_media_bytes
            raise MediaError(f"the media of a request are too large; at most {most} bytes are accepted")


def _looks_like(modality: Modality, content: bytes | bytearray) -> bool:
    found = modality_of(bytes(content[:SNIFFED_BYTES]))
    return found == modality or (modality == "video" and found == "image")  # an animated picture
