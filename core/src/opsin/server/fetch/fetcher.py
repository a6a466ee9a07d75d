"""Media that requests name by URL -> bytes, before the chat is rendered: concurrent, bounded, guarded."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from opsin.api import Modality
from opsin.errors import MediaError
from opsin.inputs.conversation import Conversation, MediaPart
from opsin.server.fetch.embeds import decode_embeds
from opsin.server.fetch.local_file import read_local_file
from opsin.server.fetch.pinned_http import PinnedHTTP, Resolver, system_resolver
from opsin.server.fetch.settings import FetchSettings
from opsin.server.fetch.sniff import SNIFFED_BYTES, modality_of
from opsin.server.http.errors import ApiError
from opsin.server.http.gather import all_of

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
            resolver, tls: as for `PinnedHTTP`.
        """
        self.settings = settings
        self._run_blocking = run_blocking
        self._slots = asyncio.Semaphore(settings.max_concurrent)
        self._http = PinnedHTTP(
            allowed_domains=settings.allowed_media_domains,
            allow_loopback=settings.allow_loopback_media,
            max_redirects=settings.max_redirects,
            resolver=resolver,
            tls=tls,
        )

    async def resolve(self, conversation: Conversation) -> Conversation:
        """Put content in the place of URLs: the result needs neither network nor files.

        http(s) and ``file://`` URLs become bytes, embeddings become tensors; ``data:`` URLs stay, to be
        decoded where pictures are. A URL that a request names several times is fetched once. The first
        failure ends all fetches of the request.

        Raises:
            ApiError: a URL may not or cannot be fetched; the error says which HTTP status that is.
            MediaError: content is too large or is no embeddings.
        """
        request = _Request(self)
        try:
            return conversation.with_values(await all_of(request.value(part) for part in conversation.media))
        finally:
            request.cancel()

    async def aclose(self) -> None:
        """Close what is open."""
        await self._http.aclose()

    async def fetch(self, url: str, modality: Modality, budget: Budget | None = None) -> bytes:
        """The content of an http(s) or ``file://`` URL, which looks like the modality.

        Raises:
            ApiError, MediaError: as `resolve`.
        """
        budget = budget or Budget(self.settings.max_request_media_bytes)
        scheme = url.partition(":")[0].lower() if ":" in url else ""
        if not scheme:
            raise MediaError("expected a data:, http:// or https:// URL")
        if scheme == "file":
            content: bytes = await self._run_blocking(
                read_local_file, url, self.settings.allowed_local_media_path, self.settings.max_media_bytes
            )
            budget.spend(len(content))
            if not _looks_like(modality, content):
                raise MediaError(f"the file:// URL leads to something that is no {modality}")
            return content
        async with self._slots:
            return await self._fetch_http(url, modality, budget)

    async def embeds(self, value: Any, budget: Budget) -> Any:
        """The tensors of an embeddings part, see `opsin.server.embeds`.

        Raises:
            MediaError: this server takes none, or not these.
        """
        if not self.settings.enable_mm_embeds:
            raise MediaError(
                "this server takes no ready-made embeddings; --enable-mm-embeds would allow them"
            )
        tensors = await self._run_blocking(decode_embeds, value, self.settings.max_media_bytes)
        named = tensors.values() if isinstance(tensors, Mapping) else [tensors]
        budget.spend(sum(tensor.nbytes for tensor in named))
        return tensors

    async def _fetch_http(self, url: str, modality: Modality, budget: Budget) -> bytes:
        content = bytearray()

        def check_kind() -> None:
            if not _looks_like(modality, content):
                raise ApiError(422, f"the URL answers with something that is no {modality}")

        def receive(piece: bytes) -> None:
            budget.spend(len(piece))
            known = len(content) >= SNIFFED_BYTES
            content.extend(piece)
            if len(content) > self.settings.max_media_bytes:
                raise MediaError(
                    f"the file is too large; at most {self.settings.max_media_bytes} bytes are accepted"
                )
            if not known and len(content) >= SNIFFED_BYTES:
                check_kind()

        try:
            await self._http.get(
                url, deadline_s=self.settings.image_fetch_timeout, receive=receive, accept=_ACCEPT[modality]
            )
        except ApiError as error:
            if error.status != 504:
                raise
            advice = "--image-fetch-timeout or OPSIN_IMAGE_FETCH_TIMEOUT sets it"
            raise ApiError(error.status, f"{error}; {advice}") from None
        check_kind()
        return bytes(content)


class Budget:
    """Bytes that the media of one request may still have."""

    def __init__(self, num_bytes: int) -> None:
        self._total = self.remaining = num_bytes

    def spend(self, num_bytes: int) -> None:
        """Raises MediaError if that is more than there is."""
        self.remaining -= num_bytes
        if self.remaining < 0:
            raise MediaError(
                f"the media of a request are too large; at most {self._total} bytes are accepted"
            )


class _Request:
    """The fetches of one request."""

    def __init__(self, fetcher: MediaFetcher) -> None:
        self._fetcher = fetcher
        self._budget = Budget(fetcher.settings.max_request_media_bytes)
        self._slots = asyncio.Semaphore(fetcher.settings.max_concurrent_per_request)
        self._running: dict[tuple[str, Modality], asyncio.Task[bytes]] = {}

    async def value(self, part: MediaPart) -> Any:
        """The part's value, fetched where it has to be."""
        if part.is_embeds:
            embeds = self._fetcher.embeds(part.value, self._budget)
            return await self._at(part, f"{part.modality}_embeds", embeds)
        if isinstance(part.value, list):  # a video's frames
            return await all_of(self._content(part, "image", frame) for frame in part.value)
        return await self._content(part, part.modality, part.value)

    def cancel(self) -> None:
        """End what nobody waits for any more."""
        for task in self._running.values():
            if not task.cancel() and not task.cancelled():
                task.exception()  # else asyncio logs that nobody looked at it

    async def _content(self, part: MediaPart, modality: Modality, value: Any) -> Any:
        if not isinstance(value, str) or value[:5].lower() == "data:":
            return value
        key = (value, modality)
        if key not in self._running:
            self._running[key] = asyncio.ensure_future(self._fetch(value, modality))
        return await self._at(part, f"{modality}_url", self._running[key])

    async def _fetch(self, url: str, modality: Modality) -> bytes:
        async with self._slots:
            return await self._fetcher.fetch(url, modality, self._budget)

    async def _at(self, part: MediaPart, param: str, result: Awaitable[T]) -> T:
        """The result; errors begin with the place and name the parameter."""
        try:
            return await result
        except ApiError as error:
            raise ApiError(error.status, f"{part.where}: {error}", param=param) from None
        except MediaError as error:
            raise MediaError(f"{part.where}: {error}") from None


def _looks_like(modality: Modality, content: bytes | bytearray) -> bool:
    found = modality_of(bytes(content[:SNIFFED_BYTES]))
    return found == modality or (modality == "video" and found == "image")  # an animated picture
