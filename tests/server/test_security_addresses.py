"""Server-side request forgery: which URLs the server opens a connection for. Each row is one way in."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import pytest
import trustme

from opsin.errors import FetchError, MediaError, OpsinError
from opsin.fetch.addresses import is_allowed
from opsin.fetch.fetcher import MediaFetcher
from opsin.fetch.pinned_http import Resolver
from opsin.fetch.settings import FetchSettings
from opsin.inputs.conversation import Conversation
from tests.server.asset_server import asset_server, free_port
from tests.server.pictures import picture

PICTURE = picture()


class Names:
    """A resolver that knows what a test tells it, and remembers what it was asked."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


def fetched(
    url: str, resolver: Resolver | None = None, tls: ssl.SSLContext | None = None, **settings: Any
) -> bytes:
    """What the server gets for a URL in a chat message."""

    async def fetch() -> bytes:
        names = {} if resolver is None else {"resolver": resolver}
        fetcher = MediaFetcher(FetchSettings(**settings), tls=tls, **names)
        try:
            part = {"type": "image_url", "image_url": {"url": url}}
            conversation = Conversation.parse([{"role": "user", "content": [part]}])
            content: bytes = (await fetcher.resolve(conversation)).media[0].value
            return content
        finally:
            await fetcher.aclose()

    return asyncio.run(fetch())


def refusal(url: str, resolver: Resolver | None = None, **settings: Any) -> FetchError:
    with pytest.raises(FetchError) as caught:
        fetched(url, resolver, **settings)
    assert caught.value.param == "image_url"
    assert str(caught.value).startswith("messages[0].content[0]: ")
    return caught.value


REFUSED_ADDRESSES = {
    "loopback": "127.0.0.1",
    "all of loopback": "127.8.9.10",
    "this host": "0.0.0.0",
    "private 10": "10.1.2.3",
    "private 172": "172.16.0.1",
    "private 192": "192.168.1.1",
    "link-local metadata": "169.254.169.254",
    "shared space, metadata of one cloud": "100.100.100.200",
    "host agent of one cloud": "168.63.129.16",
    "metadata of one cloud": "192.0.0.192",
    "benchmarking": "198.18.0.1",
    "documentation": "192.0.2.1",
    "6to4 relay": "192.88.99.1",
    "multicast": "224.0.0.1",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "v6 loopback": "::1",
    "v6 unspecified": "::",
    "v6 link-local": "fe80::1",
    "v6 link-local with its zone": "fe80::1%eth0",
    "unique local": "fc00::1",
    "unique local metadata": "fd00:ec2::254",
    "site-local": "fec0::1",
    "v6 multicast": "ff02::1",
    "v6 documentation": "2001:db8::1",
    "v6 documentation, new": "3fff::1",
    "teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "discard": "100::1",
    "mapped loopback": "::ffff:127.0.0.1",
    "mapped metadata": "::ffff:169.254.169.254",
    "mapped private": "::ffff:10.0.0.1",
    "compatible loopback": "::127.0.0.1",
    "6to4 of loopback": "2002:7f00:1::",
    "6to4 of metadata": "2002:a9fe:a9fe::1",
    "NAT64 of loopback": "64:ff9b::7f00:1",
    "NAT64 of metadata": "64:ff9b::a9fe:a9fe",
    "local NAT64": "64:ff9b:1::a00:1",
    "not an address": "localhost",
}
PUBLIC_ADDRESSES = ["8.8.8.8", "1.1.1.1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2606:4700:4700::1111"]


@pytest.mark.parametrize("address", REFUSED_ADDRESSES.values(), ids=REFUSED_ADDRESSES)
def test_a_name_that_leads_to_an_address_that_is_not_public(address: str) -> None:
    error = refusal("http://pictures.example/a.png", Names([address]))
    assert error.status == HTTPStatus.FORBIDDEN
    assert " 'pictures.example' is not on the public internet" in str(error)
    assert "--allow-loopback-media" in str(error)
    assert "--allow-private-media" in str(error)


@pytest.mark.parametrize("address", REFUSED_ADDRESSES.values(), ids=REFUSED_ADDRESSES)
def test_a_name_with_public_addresses_and_one_that_is_not(address: str) -> None:
    for answer in (["8.8.8.8", address], [address, "2606:4700:4700::1111"]):
        assert refusal("http://pictures.example/a.png", Names(answer)).status == HTTPStatus.FORBIDDEN


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public_addresses_are_public(address: str) -> None:
    assert is_allowed(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "127.8.9.10"])
def test_the_flag_opens_loopback(address: str) -> None:
    assert is_allowed(address, allow_loopback=True)


@pytest.mark.parametrize(
    "address", [a for n, a in REFUSED_ADDRESSES.items() if "oopback" not in n or "NAT" in n or "6to4" in n]
)
def test_the_flag_opens_nothing_but_loopback(address: str) -> None:
    assert is_allowed(address, allow_loopback=True) is (address == "64:ff9b::7f00:1")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "localhost",
        "LOCALHOST.",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "0",
    ],
)
def test_spellings_of_this_machine_with_the_real_resolver(host: str) -> None:
    with asset_server() as assets:
        assets.put("/secret.png", PICTURE)
        with pytest.raises(OpsinError):  # not all of them are addresses everywhere
            fetched(f"http://{host}:{assets.port}/secret.png")
        assert assets.seen == []


@pytest.mark.parametrize(
    "url",
    [
        "ftp://pictures.example/a.png",
        "gopher://pictures.example/a.png",
        "javascript:alert(1)",
        "blob:http://pictures.example/a.png",
        "unix:///var/run/docker.sock",
        "dict://127.0.0.1:11211/stat",
    ],
)
def test_other_schemes(url: str) -> None:
    names = Names(["8.8.8.8"])
    error = refusal(url, names)
    assert error.status == HTTPStatus.FORBIDDEN
    assert "expected data:, http:// or https://" in str(error)
    assert names.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://allowed.example\\@127.0.0.1/a.png",
        "http://127.0.0.1\\@allowed.example/a.png",
        "http://allowed.example\\.evil.example/a.png",
        "http://allowed.example@evil.example/a.png",
        "http://user:password@allowed.example/a.png",
        "http://allowed.example:80@evil.example/a.png",
        "http://allowed.example\t.evil.example/a.png",
        "http://allowed.example/a.png\r\nHost: evil.example",
        " http://allowed.example/a.png",
        "http://allowed.example /a.png",
        "http://evil.example/#@allowed.example/a.png",
        "http://evil.example?@allowed.example/a.png",
        "http://allowed.example.evil.example/a.png",
        "http://notallowed.example/a.png",
    ],
)
def test_urls_that_parsers_read_differently_do_not_pass_the_list_of_domains(url: str) -> None:
    names = Names(["8.8.8.8"])
    assert refusal(url, names, allowed_media_domains=["allowed.example"]).status == HTTPStatus.FORBIDDEN
    assert names.asked == [], "nothing is resolved, let alone connected to"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.png",
        "http://",
        "http:///a.png",
        "http:a.png",
        "http://a.example:0/",
        "http://a.example:65536/",
        "http://a.example:x/",
        "http://[::1",
        "https://[fe80::1%25eth0]/",
        "http://127.0.0%2e1/",
        "http://\xad/",
        "http://a.example/" + "a" * 9000,
    ],
)
def test_malformed_urls(url: str) -> None:
    with pytest.raises(MediaError, match=r"^messages\[0\]\.content\[0\]: .*(expected|accepted)"):
        fetched(url, Names(["8.8.8.8"]))


def test_the_list_of_domains_narrows() -> None:
    with asset_server() as assets:
        assets.put("/a.png", PICTURE)
        names = Names(["127.0.0.1"])
        loopback = {"allow_loopback_media": True, "allowed_media_domains": ["Pictures.Example."]}
        assert fetched(assets.url("/a.png", "pictures.example"), names, **loopback) == PICTURE
        assert fetched(assets.url("/a.png", "PICTURES.example."), names, **loopback) == PICTURE
        for host in ("other.example", "sub.pictures.example", "127.0.0.1"):
            error = refusal(assets.url("/a.png", host), names, **loopback)
            assert error.status == HTTPStatus.FORBIDDEN
            assert "not among the domains" in str(error)


def test_the_list_of_domains_does_not_open_addresses() -> None:
    with asset_server() as assets:
        assets.put("/a.png", PICTURE)
        for host in ("127.0.0.1", "localhost"):
            error = refusal(assets.url("/a.png", host), allowed_media_domains=[host])
            assert error.status == HTTPStatus.FORBIDDEN
        assert assets.seen == []


def test_the_address_that_was_checked_is_the_one_connected_to() -> None:
    """DNS rebinding: the second answer differs from the first, and nobody asks for it."""
    with asset_server() as assets:
        assets.put("/a.png", PICTURE)
        names = Names(["127.0.0.1"], ["10.0.0.1"])
        assert fetched(assets.url("/a.png", "pictures.example"), names, allow_loopback_media=True) == PICTURE
        assert names.asked == [("pictures.example", assets.port)]
        [(path, headers)] = assets.seen
        assert path == "/a.png"
        assert headers["Host"] == f"pictures.example:{assets.port}", "the server still sees the name"
        assert not {"cookie", "authorization", "referer"} & {name.lower() for name in headers}


def test_tls_keeps_the_name() -> None:
    """The certificate is checked against the URL's host, and the server is told that name (SNI)."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("pictures.example").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with asset_server(context) as assets:
        assets.put("/a.png", PICTURE)
        loopback: dict[str, Any] = {"allow_loopback_media": True, "tls": trusting}
        url = assets.url("/a.png", "pictures.example")
        assert fetched(url, Names(["127.0.0.1"]), **loopback) == PICTURE
        assert assets.server_names == ["pictures.example"]
        other = refusal(assets.url("/a.png", "other.example"), Names(["127.0.0.1"]), **loopback)
        assert other.status == HTTPStatus.BAD_GATEWAY
        assert "certificate" not in str(other), "the library's words stay inside"
        assert refusal(url, Names(["127.0.0.1"]), allow_loopback_media=True).status == HTTPStatus.BAD_GATEWAY


def test_the_next_address_is_tried() -> None:
    with asset_server() as assets:
        assets.put("/a.png", PICTURE)
        names = Names(["127.0.0.2", "::1", "127.0.0.1"])  # nothing listens on the first two
        assert fetched(assets.url("/a.png", "pictures.example"), names, allow_loopback_media=True) == PICTURE


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with asset_server() as assets, asset_server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url(""))
        monkeypatch.setenv("ALL_PROXY", proxy.url(""))
        assets.put("/a.png", PICTURE)
        assert fetched(assets.url("/a.png"), allow_loopback_media=True) == PICTURE
        assert proxy.seen == []


# --- redirects ------------------------------------------------------------------------------------


def redirect(target: str, status: int = 302) -> dict[str, Any]:
    return {"status": status, "Location": target}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status: int) -> None:
    with asset_server() as assets:
        assets.put("/a.png", PICTURE)
        assets.put("/deep/start", **redirect("../middle", status))
        assets.put("/middle", **redirect(assets.url("/a.png", "other.example"), status))
        names = Names(["127.0.0.1"])
        assert fetched(assets.url("/deep/start", "one.example"), names, allow_loopback_media=True) == PICTURE
        assert [host for host, _ in names.asked] == ["one.example", "one.example", "other.example"]


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "::1", "fd00:ec2::254", "2002:7f00:1::"])
def test_a_redirect_to_an_address_that_is_not_public(address: str) -> None:
    """The name of every hop is looked up and checked: here the second leads inside."""
    with asset_server() as assets:
        assets.put("/start", **redirect(assets.url("/secret.png", "inside.example")))
        assets.put("/secret.png", PICTURE)
        names = Names(["127.0.0.1"], [address] if address != "::1" else ["10.0.0.9", "::1"])
        error = refusal(assets.url("/start", "outside.example"), names, allow_loopback_media=True)
        assert error.status == HTTPStatus.FORBIDDEN
        assert [path for path, _ in assets.seen] == ["/start"]


@pytest.mark.parametrize(
    "target",
    [
        "ftp://pictures.example/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "//user@pictures.example/a.png",
        "http://pictures.example\\@127.0.0.1/a.png",
        "//other.example/a.png",
        "https://other.example/a.png",
    ],
)
def test_a_redirect_to_what_may_not_be_fetched(target: str) -> None:
    with asset_server() as assets:
        assets.put("/start", **redirect(target))
        error = refusal(
            assets.url("/start", "pictures.example"),
            Names(["127.0.0.1"]),
            allow_loopback_media=True,
            allowed_media_domains=["pictures.example"],
        )
        assert error.status == HTTPStatus.FORBIDDEN


def test_redirects_are_bounded() -> None:
    with asset_server() as assets:
        assets.put("/loop", **redirect("/loop"))
        assert (
            refusal(assets.url("/loop"), allow_loopback_media=True, max_redirects=3).status
            == HTTPStatus.FORBIDDEN
        )
        assert len(assets.seen) == 4
        assets.put("/0.png", PICTURE)
        for hop in (1, 2, 3, 4):
            assets.put(f"/{hop}", **redirect(f"/{hop - 1}" if hop > 1 else "/0.png"))
        assert fetched(assets.url("/3"), allow_loopback_media=True, max_redirects=3) == PICTURE
        refusal(assets.url("/4"), allow_loopback_media=True, max_redirects=3)


def test_nothing_listens() -> None:
    error = refusal(f"http://127.0.0.1:{free_port()}/a.png", allow_loopback_media=True)
    assert error.status == HTTPStatus.BAD_GATEWAY
    assert str(error) == "messages[0].content[0]: '127.0.0.1' cannot be reached"


@pytest.mark.parametrize(
    "failure", [OSError("Name or service not known 0x7f"), UnicodeError("label too long")]
)
def test_a_name_without_an_address(failure: Exception) -> None:
    async def resolver(host: str, port: int) -> Sequence[str]:
        raise failure

    error = refusal("http://nowhere.example/a.png", resolver)
    assert error.status == HTTPStatus.BAD_GATEWAY
    assert str(error) == "messages[0].content[0]: 'nowhere.example' cannot be reached"
