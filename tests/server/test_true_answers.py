"""OpenAI's client, a model that sees, pictures whose answers are known: nothing is mixed up on the way."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from PIL import Image

from opsin import EngineConfig
from opsin.fetch.settings import FetchSettings
from opsin.server.settings import ServerSettings
from tests.server.asset_server import AssetServer, asset_server
from tests.server.in_thread import Running, running
from tests.server.messages import data_url, image, text, user

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

from scenes import HELD_OUT_SEEDS, make_question

if TYPE_CHECKING:
    from scenes import Question

KINDS = ("colour", "shape", "position", "describe", "count", "number", "compare")
MODEL = "opsin/tiny-qwen2vl"
QUESTIONS = [make_question(kind, HELD_OUT_SEEDS[0] + 600_000 + seed) for seed in range(4) for kind in KINDS]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    config = EngineConfig(model=MODEL, limit_mm_per_prompt={"image": 8, "video": 1}, kv_cache_memory=2**26)
    settings = ServerSettings(fetch=FetchSettings(allow_loopback_media=True))
    with running(config, settings) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def assets() -> Iterator[AssetServer]:
    with asset_server() as started:
        yield started


def encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def inline(question: Question) -> Any:
    """As messages with the pictures in them."""
    pictures = [image(data_url(encoded(picture))) for picture in question.images]
    return user(*pictures, text(question.text))


def ask(client: openai.OpenAI, messages: Any, **options: Any) -> str | None:
    body = {"temperature": 0, "max_tokens": 48, **options}
    answer = client.chat.completions.create(model=MODEL, messages=messages, **body)
    content: str | None = answer.choices[0].message.content
    return content


def streamed(client: openai.OpenAI, messages: Any) -> str:
    chunks = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=48, stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_one_after_the_other_streamed_together_and_by_url(
    client: openai.OpenAI, server: Running, assets: AssetServer
) -> None:
    alone = [ask(client, inline(question)) for question in QUESTIONS]
    right = sum(answer == question.answer for answer, question in zip(alone, QUESTIONS, strict=True))
    assert right >= 0.9 * len(QUESTIONS), f"{right} of {len(QUESTIONS)}"
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        assert list(pool.map(lambda question: streamed(client, inline(question)), QUESTIONS)) == alone

    def by_url(number: int) -> str:
        question = QUESTIONS[number]
        urls = [
            assets.put(f"/{number}-{index}.png", encoded(picture))
            for index, picture in enumerate(question.images)
        ]
        return streamed(client, user(*map(image, urls), text(question.text)))

    before = server.engine.stats().num_encoded
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        assert list(pool.map(by_url, range(len(QUESTIONS)))) == alone
    assert server.engine.stats().num_encoded == before, "known by their content, whichever way they come"


def square(colour: str) -> bytes:
    picture = Image.new("RGB", (112, 112), "grey")
    picture.paste(colour, (34, 34, 78, 78))
    return encoded(picture)


def test_equal_words_and_sizes_with_other_pictures_get_other_answers(client: openai.OpenAI) -> None:
    """All that differs is the picture: a prefix cache that does not know it would repeat the first answer."""
    colours = ["red", "blue", "green", "yellow"]
    asked = [user(image(data_url(square(colour))), text("What colour is the square?")) for colour in colours]
    for _ in range(2):
        assert [ask(client, messages) for messages in asked] == colours
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda messages: ask(client, messages), asked * 2)) == colours * 2


def test_words_between_pictures_and_earlier_messages(client: openai.OpenAI) -> None:
    red, blue = image(data_url(square("red"))), image(data_url(square("blue")))
    question = text("What colour is the square?")
    earlier = [*user(red, question), {"role": "assistant", "content": "red"}]
    assert ask(client, [*earlier, *user(blue, question)]) == "blue"


def test_json_by_a_schema_is_about_the_picture(client: openai.OpenAI) -> None:
    schema = {"type": "integer", "minimum": 0, "maximum": 9}
    wanted = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema}}
    for number in (1, 2, 3, 4):
        picture = Image.new("RGB", (112, 112), "grey")
        for x, y in ((14, 14), (70, 16), (16, 72), (72, 70))[:number]:
            picture.paste("red", (x, y, x + 20, y + 20))
        messages = user(image(data_url(encoded(picture))), text("How many squares are there?"))
        assert ask(client, messages, response_format=wanted) == str(number)


def test_constraints_and_samples_see_the_picture(client: openai.OpenAI) -> None:
    colours = ["blue", "green", "purple", "red", "yellow"]
    for colour in ("green", "purple"):
        messages = user(image(data_url(square(colour))), text("What colour is the square?"))
        assert ask(client, messages, extra_body={"guided_choice": colours}) == colour
        regex = {"regex": "|".join(colours)}
        assert ask(client, messages, extra_body={"structured_outputs": regex}) == colour
        # A quotation mark comes first in no answer that the model was trained on, a digit does.
        schema = {"enum": colours}
        wanted = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}}
        assert json.loads(ask(client, messages, response_format=wanted)) in colours
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, n=2, temperature=0, max_tokens=8, logprobs=True
        )
        assert [choice.message.content for choice in answer.choices] == [colour] * 2
        for choice in answer.choices:
            assert choice.logprobs is not None
            assert all(entry.logprob > -1 for entry in choice.logprobs.content or ()), "it is sure"
