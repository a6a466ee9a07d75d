"""The security rules through the whole server, over a real socket: status, error body, and it lives on."""

from __future__ import annotations

import base64
import hmac
import json
import re
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import ImageFile
from safetensors.torch import save

from opsin.fetch.settings import FetchSettings
from opsin.server.http import middleware
from opsin.server.settings import ServerSettings
from tests.server.asset_server import Asset, AssetServer, asset_server
from tests.server.in_thread import MODEL, Running, golden_config, running
from tests.server.pictures import claims_to_be_huge, gif, inflates, inflating_text, picture, png
from tests.server.process import GOLDEN

CONFIG = golden_config(limit_mm_per_prompt={"image": 4, "video": 2})
HIDDEN = json.loads((Path(MODEL) / "config.json").read_text())["hidden_size"]
PICTURE = picture((56, 56))
CAT = str(GOLDEN / "images" / "cat_150x240.png")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared folder with a picture; beside it a secret one, and a link to that inside."""
    folder = tmp_path_factory.mktemp("media") / "shared"
    folder.mkdir()
    (folder / "a.png").write_bytes(PICTURE)
    (folder.parent / "secret.png").write_bytes(PICTURE)
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    return folder


@pytest.fixture(scope="module")
def closed() -> Iterator[Running]:
    """A server as it comes."""
    with running(CONFIG, ServerSettings()) as server:
        yield server


@pytest.fixture(scope="module")
def opened(shared: Path) -> Iterator[Running]:
    """A server with all flags that open something."""
    fetch = FetchSettings(
        allow_loopback_media=True,
        allowed_local_media_path=shared,
        enable_mm_embeds=True,
        image_fetch_timeout=0.5,
    )
    with running(CONFIG, ServerSettings(fetch=fetch)) as server:
        yield server


@pytest.fixture(scope="module")
def assets() -> Iterator[AssetServer]:
    with asset_server() as server:
        yield server


def ask(server: Running, *parts: Any, **fields: Any) -> requests.Response:
    body = {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}],
        "max_tokens": 1,
        **fields,
    }
    return requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def inline(data: bytes) -> dict[str, Any]:
    return image("data:image/png;base64," + base64.b64encode(data).decode())


LEAKS = re.compile(
    r"\b0x[0-9a-f]{4,}|traceback|site-packages|\.py\b|/tmp/|/work|/root|/usr|PIL|httpx|errno|\[Err", re.I
)


def refused(response: requests.Response, status: int, *, param: str | None = None) -> str:
    """The message of an error, after checking its form and that it tells nothing of the inside."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["param"] == param
    message: str = error["message"]
    assert not LEAKS.search(message), message
    return message


# --- URLs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/health",
        "http://localhost/a.png",
        "http://[::1]/a.png",
        "http://[::ffff:169.254.169.254]/latest/meta-data/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/a.png",
        "http://[fd00:ec2::254]/a.png",
        "http://[64:ff9b::a9fe:a9fe]/a.png",
        "https://192.168.0.1/a.png",
        "http://0.0.0.0/a.png",
        "http://good.example\\@127.0.0.1/a.png",
        "http://user@127.0.0.1/a.png",
        "ftp://127.0.0.1/a.png",
        "gopher://127.0.0.1:6379/_INFO",
        "file:///etc/passwd",
        "file:///dev/zero",
    ],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_urls_that_are_not_allowed(closed: Running, url: str, kind: str) -> None:
    part = image(url) if kind == "image" else video(url)
    for stream in (False, True):
        message = refused(ask(closed, part, stream=stream), 403, param=f"{kind}_url")
        assert message.startswith("messages[0].content[0]: ")


def test_a_public_page_that_redirects_inside(opened: Running, assets: AssetServer) -> None:
    for target in ("http://169.254.169.254/latest/", "http://10.0.0.1/", "file:///etc/passwd"):
        refused(ask(opened, image(assets.put("/hop", status=302, Location=target))), 403, param="image_url")


@pytest.mark.parametrize(
    ("status", "expected"), [(404, 422), (403, 422), (500, 502), (503, 502), (408, 502), (429, 502)]
)
def test_statuses_of_urls(opened: Running, assets: AssetServer, status: int, expected: int) -> None:
    refused(ask(opened, image(assets.put("/a.png", b"", status))), expected, param="image_url")


def test_urls_that_answer_with_something_else_or_not_at_all(
    opened: Running, assets: AssetServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(ask(opened, image(assets.put("/page", b"<html>" * 10))), 422, param="image_url")
    assets.assets["/slow"] = Asset(stream=lambda _, closing: closing.wait(10))
    message = refused(ask(opened, image(assets.url("/slow"))), 504, param="image_url")
    assert "'127.0.0.1'" in message
    assert "0.5 s" in message
    assert "OPSIN_IMAGE_FETCH_TIMEOUT" in message
    refused(ask(opened, image("http://nowhere.invalid/a.png")), 502, param="image_url")
    refused(ask(opened, image(assets.put("/cut.png", PICTURE[:60]))), 400)
    good = ask(opened, image(assets.put("/good.png", PICTURE)), video(assets.put("/good.gif", gif(3, 56))))
    assert good.status_code == 200, good.text


class Names:
    """A resolver with the answers of a test; anything else is this machine."""

    def __init__(self, **answers: Sequence[str]) -> None:
        self._answers = answers

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        return self._answers.get(host.partition(".")[0], ["127.0.0.1"])


def test_names_with_one_address_inside(
    opened: Running, assets: AssetServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the others are public; and a public page that redirects to such a name."""
    names = Names(
        mixed=["8.8.8.8", "10.0.0.1"], mixed6=["127.0.0.1", "fd00::1"], metadata=["169.254.169.254"]
    )
    monkeypatch.setattr(opened.app._fetcher._http, "_resolver", names)
    good = assets.put("/a.png", PICTURE)
    assert ask(opened, image(good.replace("127.0.0.1", "public.example"))).status_code == 200
    before = len(assets.seen)
    for host in ("mixed.example", "mixed6.example", "metadata.example"):
        refused(ask(opened, image(good.replace("127.0.0.1", host))), 403, param="image_url")
    assert len(assets.seen) == before, "nothing was connected to"
    hop = assets.put("/hop", status=302, Location=good.replace("127.0.0.1", "mixed6.example"))
    refused(ask(opened, image(hop)), 403, param="image_url")
    assert [path for path, _ in assets.seen[before:]] == ["/hop"]


def test_the_list_of_domains(assets: AssetServer) -> None:
    url = assets.put("/a.png", PICTURE)
    narrowed = FetchSettings(allow_loopback_media=True, allowed_media_domains=["localhost"])
    with running(CONFIG, ServerSettings(fetch=narrowed)) as server:
        assert ask(server, image(url.replace("127.0.0.1", "localhost"))).status_code == 200
        for other in (url, url.replace("127.0.0.1", "localhost.evil.example"), "http://8.8.8.8/a.png"):
            assert "domains" in refused(ask(server, image(other)), 403, param="image_url")
        away = assets.put("/away", status=302, Location=url).replace("127.0.0.1", "localhost")
        refused(ask(server, image(away)), 403, param="image_url")
    never_widened = FetchSettings(allowed_media_domains=["localhost", "127.0.0.1"])
    with running(CONFIG, ServerSettings(fetch=never_widened)) as server:
        for inside in (url, url.replace("127.0.0.1", "localhost")):
            assert "public internet" in refused(ask(server, image(inside)), 403, param="image_url")


# --- files ----------------------------------------------------------------------------------------


def test_files(opened: Running, shared: Path) -> None:
    assert ask(opened, image(f"file://{shared}/a.png")).status_code == 200
    outside = (f"{shared}/../secret.png", f"{shared}/link.png", f"{shared}/%2e%2e/secret.png", "/etc/passwd")
    messages = {refused(ask(opened, image(f"file://{path}")), 403, param="image_url") for path in outside}
    assert len(messages) == 1, "whether it is there is not told"
    refused(ask(opened, image(f"file://{shared}/missing.png")), 400)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "/etc/passwd"},
        {"type": "image", "image": CAT},
        {"type": "video", "video": "/etc"},
        {"type": "video", "video": ["/etc/passwd"]},
        {"type": "image_embeds", "image_embeds": CAT},
        {"type": "image_embeds", "image_embeds": {"image_embeds": "/etc/passwd"}},
        image("/etc/passwd"),
        image("../../etc/passwd"),
        image("data:/etc/passwd"),
    ],
)
def test_paths_in_other_parts(opened: Running, closed: Running, part: dict[str, Any]) -> None:
    for server in (opened, closed):
        refused(ask(server, part), 400)


# --- pictures -------------------------------------------------------------------------------------

BAD_PICTURES = {
    "says 30000x30000": claims_to_be_huge(),
    "says 9000x9000": png(9000, 9000, b""),
    "inflates a text": inflating_text(),
    "EPS": EPS,
    "EPS in a TIFF's clothes": b"II*\0" + EPS,
    "PDF": b"%PDF-1.4\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "no width": png(0, 5, b""),
    "truncated": PICTURE[:-30],
    "truncated JPEG": picture(format="JPEG")[:-200],
    "nothing": b"",
    "noise": bytes(range(256)) * 4,
}


@pytest.mark.parametrize("data", BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_pictures_that_are_refused(
    closed: Running, opened: Running, assets: AssetServer, data: bytes
) -> None:
    message = refused(ask(closed, inline(data)), 400)
    assert message.startswith("messages[0].content[0]: ")
    fetched = ask(opened, image(assets.put("/bad.png", data)))
    assert fetched.status_code in (400, 422)
    refused(fetched, fetched.status_code, param="image_url" if fetched.status_code == 422 else None)


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64,@@@", "data:image/png;base64", "data:", "data:,", "data:image/png;base64,AAAA"],
)
def test_data_urls_that_are_refused(closed: Running, url: str) -> None:
    refused(ask(closed, image(url)), 400)


def test_what_inflates_stays_small(closed: Running) -> None:
    """The header says 4x4 pixels: the decoder stops there, whatever more the file would unpack to."""
    bomb = inline(inflates())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    response = ask(closed, bomb)
    assert response.status_code == 200, response.text
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 2**10, f"{grown} KiB for a picture that would unpack to 256 MiB"
    black = ask(closed, inline(picture((4, 4), "black")))
    assert response.json()["choices"] == black.json()["choices"], "the pixels that the header speaks of"


def test_an_animation_of_10000_frames(closed: Running) -> None:
    """As a picture its first frame, as a video a few, evenly spread."""
    film = gif(10_000, 8)
    url = "data:image/gif;base64," + base64.b64encode(film).decode()
    one = ask(closed, image(url))
    assert one.status_code == 200, one.text
    many = ask(closed, video(url))
    assert many.status_code == 200, many.text
    assert many.json()["usage"]["prompt_tokens"] < one.json()["usage"]["prompt_tokens"] + 100


def test_a_video_of_too_many_frames(closed: Running) -> None:
    frame = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    assert "1 to 768" in refused(ask(closed, {"type": "video", "video": [frame] * 769}), 400)


def test_the_caps_of_bytes_pixels_and_frames(assets: AssetServer) -> None:
    """Each as small as a test likes it, for media that come inline and for those that are fetched."""
    large = picture((56, 56)) + bytes(4000)
    config = golden_config(
        limit_mm_per_prompt={"image": 4, "video": 2},
        max_media_bytes=4000,
        max_image_pixels=100 * 100,
        max_video_pixels=5 * 60 * 60,
        max_video_frames=6,
    )
    fetch = FetchSettings(allow_loopback_media=True, max_media_bytes=4000, max_request_media_bytes=5000)
    with running(config, ServerSettings(fetch=fetch)) as server:
        assert ask(server, inline(PICTURE)).status_code == 200
        for part in (inline(large), image(assets.put("/large.png", large))):
            assert "at most 4000" in refused(ask(server, part), 400)
        urls = [assets.put(f"/{number}.png", PICTURE + bytes(2500)) for number in range(2)]
        assert ask(server, image(urls[0])).status_code == 200
        assert "at most 5000 bytes" in refused(ask(server, *map(image, urls)), 400)
        assert "at most 10000" in refused(ask(server, inline(png(101, 100, b""))), 400)
        frame = inline(PICTURE)["image_url"]["url"]
        for count, expected in ((5, 200), (6, 400), (7, 400)):
            answer = ask(server, {"type": "video", "video": [frame] * count})
            assert answer.status_code == expected, answer.text


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (1, 200), (3, 1), (400, 2)])
def test_odd_sizes_are_answered(closed: Running, size: tuple[int, int]) -> None:
    response = ask(closed, inline(picture(size)))
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens"] > ask(closed).json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize("size", [(1, 201), (402, 2), (4000, 2)])
def test_what_is_too_elongated_is_refused(closed: Running, size: tuple[int, int]) -> None:
    """The family's own limit: one side at most 200 times the other."""
    assert f"{size[0]}x{size[1]} is too elongated" in refused(ask(closed, inline(picture(size))), 400)


def test_truncated_pictures_are_nowhere_allowed(closed: Running) -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


# --- embeddings -----------------------------------------------------------------------------------

ROWS = torch.linspace(-1, 1, 4 * HIDDEN).reshape(4, HIDDEN)
GRID = torch.tensor([[1, 4, 4]])


def embeds(rows: torch.Tensor, grid: torch.Tensor = GRID) -> dict[str, Any]:
    data = save({"image_embeds": rows.contiguous(), "image_grid_thw": grid})
    return {"type": "image_embeds", "image_embeds": base64.b64encode(data).decode()}


def test_embeddings_by_flag_only(closed: Running, opened: Running) -> None:
    assert "--enable-mm-embeds" in refused(ask(closed, embeds(ROWS)), 400)
    good = ask(opened, embeds(ROWS))
    assert good.status_code == 200, good.text
    half = ask(opened, embeds(ROWS.half()))
    assert half.status_code == 200, half.text
    for same in (embeds(ROWS[None]), embeds(ROWS, torch.tensor([1, 4, 4]))):  # a batch of one; its size alone
        other = ask(opened, same)
        assert other.status_code == 200, other.text
        assert other.json()["choices"] == good.json()["choices"]


@pytest.mark.parametrize(
    "part",
    [
        embeds(ROWS[:, :-1]),
        embeds(ROWS[:3]),
        embeds(ROWS * float("nan")),
        embeds(ROWS, torch.tensor([[1, 4000, 4000]])),
        embeds(ROWS, torch.tensor([[1, -4, -4]])),
        embeds(ROWS[:, None]),
        embeds(ROWS[None, None]),
        {"type": "image_embeds", "image_embeds": base64.b64encode(save({"x": ROWS})).decode()},
        {"type": "video_embeds", "video_embeds": base64.b64encode(save({"x": ROWS})).decode()},
        {"type": "image_embeds", "image_embeds": {"unknown": base64.b64encode(save({"x": ROWS})).decode()}},
        {"type": "image_embeds", "image_embeds": base64.b64encode(np.zeros(9).tobytes()).decode()},
    ],
)
def test_embeddings_that_do_not_fit(opened: Running, part: dict[str, Any]) -> None:
    refused(ask(opened, part), 400)


# --- keys -----------------------------------------------------------------------------------------


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, whichever fits, by a comparison of digests that does not end early."""
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return real(left, right)

    monkeypatch.setattr(middleware.hmac, "compare_digest", compare)
    settings = ServerSettings(api_key=("first", "second", "third"))
    with running(CONFIG, settings, wait=False) as server:
        for key, status in (("first", 200), ("third", 200), ("", 401), ("first" * 1000, 401)):
            compared.clear()
            answer = server.get("/metrics", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == status
            assert compared == [(32, 32)] * 3


# --- afterwards -----------------------------------------------------------------------------------


def test_both_servers_still_answer(closed: Running, opened: Running) -> None:
    for server in (closed, opened):
        assert requests.get(f"{server.url}/health", timeout=10).status_code == 200
        assert ask(server, inline(PICTURE)).status_code == 200
