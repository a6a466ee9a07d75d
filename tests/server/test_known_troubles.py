"""What users of other servers have suffered from, through the whole server."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from safetensors.torch import save

from opsin.fetch.settings import FetchSettings
from opsin.server.settings import ServerSettings
from tests.server.in_thread import MODEL, Running, golden_config, running
from tests.server.messages import CAT, data_url, image, text, user
from tests.server.pictures import picture
from tests.server.process import serve

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def fresh() -> Iterator[Running]:
    """A server that nobody has asked yet, which takes embeddings and very many pictures."""
    config = golden_config(limit_mm_per_prompt={"image": 999})
    with running(config, ServerSettings(fetch=FetchSettings(enable_mm_embeds=True))) as started:
        yield started


def ask(server: Running, *parts: Any, **fields: Any) -> Any:
    body = {"messages": user(*parts, text("?")), "max_tokens": 4, "temperature": 0, **fields}
    response = server.post(CHAT, body)
    assert response.status_code == 200, response.text
    return response.json()


def test_starting_encodes_no_worst_case(fresh: Running) -> None:
    """999 pictures may come in a request; memory for them is not tried out at the start."""
    stats = fresh.engine.stats()
    assert stats.num_encoded == 0
    assert stats.encoder_cache_bytes == 0


def embeds(rows: torch.Tensor) -> dict[str, Any]:
    data = save({"image_embeds": rows, "image_grid_thw": torch.tensor([[1, 16, 16]])})
    return {"type": "image_embeds", "image_embeds": base64.b64encode(data).decode()}


def test_ready_made_embeddings_are_cached_by_their_content(fresh: Running) -> None:
    rows = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
    first = ask(fresh, embeds(rows))
    again = ask(fresh, embeds(rows.clone()))
    other = ask(fresh, embeds(rows.flip(0).contiguous()))

    def cached(answer: Any) -> int:
        count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert again["choices"] == first["choices"]
    assert cached(again) >= 64, "the rows are behind the prefix that is known"
    assert cached(other) < 64


def test_pictures_of_equal_bytes_and_other_shapes_are_two_pictures(fresh: Running) -> None:
    """A digest of the pixels alone would give the second asker the first one's picture."""
    content = bytes(range(256)) * 73 + bytes(128)  # 56 x 112 x 3
    urls = []
    for size in ((112, 56), (56, 112)):
        file = io.BytesIO()
        Image.frombytes("RGB", size, content).save(file, "PNG")
        urls.append(data_url(file.getvalue()))
    before = fresh.engine.stats().num_encoded
    answers = [logprobs(ask(fresh, image(url), logprobs=True)) for url in urls * 2]
    assert fresh.engine.stats().num_encoded == before + 2
    assert np.allclose(answers[0], answers[2], atol=1e-4)
    assert np.allclose(answers[1], answers[3], atol=1e-4)
    assert not np.allclose(answers[0], answers[1], atol=1e-2)


def test_a_picture_is_the_one_that_a_person_sees(fresh: Running) -> None:
    """Turned by its EXIF orientation, and without the colours under its transparent pixels."""
    rng = np.random.default_rng(3)
    shown = Image.fromarray(rng.integers(0, 256, (56, 84, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    hidden = shown.convert("RGBA")
    hidden.paste((0, 0, 255, 0), (0, 0, 28, 28))
    laid = shown.copy()
    laid.paste("white", (0, 0, 28, 28))

    def posted(picture: Image.Image, **options: Any) -> list[float]:
        file = io.BytesIO()
        picture.save(file, "PNG", **options)
        return logprobs(ask(fresh, image(data_url(file.getvalue())), logprobs=True))

    upright = posted(shown)
    assert np.allclose(posted(shown.transpose(Image.Transpose.ROTATE_90), exif=exif), upright, atol=1e-4)
    assert np.allclose(posted(hidden), posted(laid), atol=1e-4)
    assert not np.allclose(posted(hidden), upright, atol=1e-2)


def test_frames_may_say_when_they_are_shown_and_parts_have_no_size(fresh: Running) -> None:
    frames = {"type": "video", "video": [data_url(picture()), data_url(picture(colour="blue"))]}
    assert ask(fresh, {**frames, "fps": 2.0})["choices"] == ask(fresh, frames)["choices"]
    for part, complaint in [
        ({**frames, "fps": 0}, "greater than 0"),
        ({**frames, "video": data_url(picture()), "fps": 2.0}, "has times of its own"),
        ({**frames, "max_pixels": 3136}, "mm_processor_kwargs holds for all"),
    ]:
        response = fresh.post(CHAT, {"messages": user(part), "max_tokens": 1})
        assert response.status_code == 400
        assert complaint in response.text


def logprobs(answer: Any) -> list[float]:
    return [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]


def test_one_bad_picture_among_good_ones(fresh: Running) -> None:
    good, bad = image(data_url(CAT)), image(data_url(picture()[:60]))
    expected = ask(fresh, good)["choices"]

    def post(part: Any) -> Any:
        body = {"messages": user(part, text("?")), "max_tokens": 4, "temperature": 0}
        return fresh.post(CHAT, body)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(post, [good, bad] * 6))
    assert [answer.status_code for answer in answers] == [200, 400] * 6
    assert all(answer.json()["choices"] == expected for answer in answers[::2])


def test_the_caches_of_the_host_stay_within_their_bounds() -> None:
    """However many different pictures come."""
    most = 2**20
    config = golden_config(media_cache_memory=most, encoder_cache_memory=most)
    with running(config) as server:
        for number in range(40):
            ask(server, image(data_url(picture((224, 224), f"#{number:02x}8040"))), max_tokens=1)
            assert server.engine.frontend.processor.mapped_media.num_bytes <= most
            assert server.engine.stats().encoder_cache_bytes <= most
        assert server.engine.frontend.processor.mapped_media.num_bytes > most // 4, "it does hold some"


def test_nothing_is_written_to_disk(tmp_path: Path) -> None:
    """Neither to the user's folder, nor where temporary files go, nor where it was started."""
    places = {"HOME": tmp_path / "home", "TMPDIR": tmp_path / "tmp", "HF_HOME": tmp_path / "hub"}
    for place in places.values():
        place.mkdir()
    here = set(os.listdir())
    environment = {name: str(place) for name, place in places.items()}
    with serve(MODEL, log=tmp_path / "log", environment=environment) as process:
        body = {"messages": user(image(data_url(CAT)), text("?")), "max_tokens": 4}
        answer = requests.post(process.url + CHAT, json=body, timeout=60)
        assert answer.status_code == 200
    written = [path for place in places.values() for path in place.rglob("*") if path.is_file()]
    assert written == []
    assert set(os.listdir()) == here
