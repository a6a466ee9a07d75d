"""GET for URLs from strangers: only to public addresses, and only to the addresses that were checked.

The guards against server-side request forgery, in the order of a request:

1. one parser: the `httpx2.URL` that is checked is the one that is requested; no other code reads the text
2. scheme http or https, no user name, no backslash; the host is one of the allowed domains, if there are any
3. the host is resolved once; if any of its addresses is not allowed, none is used
4. the connection goes to a checked address, whatever the name resolves to by now; Host header and TLS server
   name stay the URL's
5. redirects are followed here, by the same steps, a bounded number of times; no cookies, no proxies, no
   connection is used twice
6. the content is capped while it comes in, and its first bytes decide whether the rest is read
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from importlib.metadata import version

import httpx2

from opsin.errors import FetchError, MediaError
from opsin.fetch.addresses import is_allowed
from opsin.fetch.settings import FetchSettings

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host name or literal address, port -> addresses, best first. Raises OSError if there are none."""

MAX_URL_CHARS = 8192
MAX_TRIED_ADDRESSES = 4
_REDIRECTS = (301, 302, 303, 307, 308)
_TEMPORARY = (408, 429)


async def system_resolver(host: str, port: int) -> list[str]:
    """Ask the operating system, on a thread of the event loop's executor."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class PinnedHTTP:
    """Fetches from public addresses. Belongs to one event loop; close it with `aclose`."""

    def __init__(self, settings: FetchSettings, *, resolver: Resolver, tls: ssl.SSLContext | None) -> None:
        """Set up; nothing is opened yet.

        Args:
            settings: what is allowed.
            resolver: gives the addresses of a host.
            tls: certificates to trust; None: the system's, or those of SSL_CERT_FILE or SSL_CERT_DIR.
        """
        self._settings = settings
        domains = settings.allowed_media_domains
        self._domains = None if domains is None else {_canonical(name) for name in domains}
        self._private = settings.private_networks
        self._resolver = resolver
        # httpx2's transport rather than its client: a client has cookies, proxies and redirects of its own.
        # Connections are not kept: one is known by its address, and could be handed to another host's URL.
        self._transport = httpx2.AsyncHTTPTransport(
            verify=tls or _trusted(),
            limits=httpx2.Limits(max_keepalive_connections=0),
            trust_env=False,
        )

    async def get(self, url: str, *, receive: Callable[[bytes], None], accept: str) -> None:
        """Fetch one URL.

        Args:
            url: as the client wrote it.
            receive: gets the content in pieces; what it raises ends the fetch.
            accept: the Accept header.

        Raises:
            FetchError: not allowed, an error status, not reachable, or not in time.
            MediaError: not a URL.
        """
        parsed, deadline_s = parse_url(url), self._settings.image_fetch_timeout
        host = shown(parsed)
        try:
            await asyncio.wait_for(self._follow(parsed, receive, accept), deadline_s)
        except (asyncio.TimeoutError, httpx2.TimeoutException):
            raise FetchError(
                504,
                f"fetching from {host} was not done within {deadline_s:g} s; "
                "--image-fetch-timeout or OPSIN_IMAGE_FETCH_TIMEOUT sets it",
            ) from None
        except httpx2.TransportError:
            raise FetchError(502, f"{host} cannot be reached") from None

    async def aclose(self) -> None:
        """Close what is open."""
        await self._transport.aclose()

    async def _follow(self, url: httpx2.URL, receive: Callable[[bytes], None], accept: str) -> None:
        most = self._settings.max_redirects
        for _ in range(most + 1):
            response = await self._send(url, accept)
            try:
                location = response.headers.get("location")
                if response.status_code not in _REDIRECTS or location is None:
                    await _read(url, response, receive)
                    return
                url = parse_url(location, base=url)
            finally:
                await response.aclose()
        raise FetchError(403, f"{shown(url)} is the end of more than {most} redirects")

    async def _send(self, url: httpx2.URL, accept: str) -> httpx2.Response:
        addresses = await self._addresses(url)
        # An address that swallows packets must leave time for the others.
        connect_s = self._settings.image_fetch_timeout / len(addresses)
        headers = {
            "Host": url.netloc.decode("ascii"),
            "User-Agent": f"opsin/{version('opsin')}",
            "Accept": accept,
            "Accept-Encoding": "identity",  # what is not compressed cannot unpack to more than it was
        }
        host = url.raw_host.decode("ascii")
        for tried, address in enumerate(addresses, 1):
            request = httpx2.Request(
                "GET",
                url.copy_with(host=address),
                headers=headers,
                extensions={"sni_hostname": host, "timeout": {"connect": connect_s}},
            )
            try:
                return await self._transport.handle_async_request(request)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if tried == len(addresses):
                    raise
        raise AssertionError("a host has at least one address")

    async def _addresses(self, url: httpx2.URL) -> Sequence[str]:
        """The addresses of a URL's host, all of them allowed."""
        host = url.raw_host.decode("ascii")
        if self._domains is not None and _canonical(host) not in self._domains:
            raise FetchError(403, f"{shown(url)} is not among the domains this server fetches from")
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        try:
            addresses = await self._resolver(host, port)
        except (OSError, UnicodeError):
            addresses = []
        if not addresses:
            raise FetchError(502, f"{shown(url)} cannot be reached")
        # All of them: otherwise a name with a public and a private address would be a matter of luck.
        loopback, private = self._settings.allow_loopback_media, self._private
        if not all(is_allowed(text, allow_loopback=loopback, private=private) for text in addresses):
            raise FetchError(
                403,
                # Both flags, whichever it is: where a name leads inside is nothing for strangers.
                f"{shown(url)} is not on the public internet (the operator can allow this machine's own "
                "addresses with --allow-loopback-media, a private network with --allow-private-media)",
            )
        return addresses[:MAX_TRIED_ADDRESSES]


def parse_url(text: str, base: httpx2.URL | None = None) -> httpx2.URL:
    """An http(s) URL, or a redirect's target relative to ``base``.

    Raises:
        FetchError: it may not be fetched, wherever it leads.
        MediaError: it is not a URL.
    """
    if len(text) > MAX_URL_CHARS:
        raise MediaError(f"the URL has {len(text)} characters; at most {MAX_URL_CHARS} are accepted")
    if "\\" in text or any(character <= " " or character == "\x7f" for character in text):
        # Parsers disagree on where the host ends in these.
        raise FetchError(403, "the URL has a backslash, blank or control character; percent-encode it")
    try:
        url = httpx2.URL(text) if base is None else base.join(text)
        port = url.port
    except (httpx2.InvalidURL, UnicodeError, ValueError, TypeError):
        raise MediaError("the URL is malformed; expected http(s)://host/path") from None
    if url.scheme not in ("http", "https"):
        raise FetchError(
            403,
            f"{url.scheme[:20] or 'other'}: URLs are not fetched; expected data:, http:// or https://",
        )
    if url.userinfo or "@" in url.netloc.decode("ascii"):
        raise FetchError(403, "URLs with a user name or password are not fetched")
    if not url.raw_host or b"%" in url.raw_host or (port is not None and not 1 <= port <= 65535):
        raise MediaError("the URL names no host and port; expected http(s)://host/path")
    return url


def shown(url: httpx2.URL) -> str:
    """The host as error messages show it: quoted, shortened."""
    return repr(url.raw_host.decode("ascii")[:100])


async def _read(url: httpx2.URL, response: httpx2.Response, receive: Callable[[bytes], None]) -> None:
    status = response.status_code
    if status >= 500 or status in _TEMPORARY:
        raise FetchError(502, f"{shown(url)} answered with status {status}")
    if not 200 <= status < 300:
        raise FetchError(422, f"{shown(url)} answered with status {status}")
    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise FetchError(422, f"{shown(url)} answered with compressed content")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    async for piece in response.stream:
        receive(piece)


@lru_cache(maxsize=1)
def _trusted() -> ssl.SSLContext:
    """The system's certificates, read once: that takes tens of milliseconds."""
    return httpx2.create_ssl_context()


def _canonical(host: str) -> str:
    return host.lower().rstrip(".")
