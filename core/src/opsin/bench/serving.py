"""A running server, over HTTP: requests come at random, and every piece of an answer is timed."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from opsin.bench.prompts import Conversation, Prompts
from opsin.bench.settings import PromptSettings, ServeSettings
from opsin.bench.summary import Results, Timing
from opsin.errors import ConfigError, OpsinError

if TYPE_CHECKING:
    import httpx2

_SHOWN_ERROR = 300


class ServerError(OpsinError):
    """The server cannot be reached, or does not serve what is asked of it."""


class RequestFailedError(OpsinError):
    """One request was not answered; the message is the server's."""


@dataclass(frozen=True, kw_only=True)
class _Server:
    client: httpx2.AsyncClient
    url: str
    model: str


def measure(model: str | None, load: ServeSettings, requests: PromptSettings) -> Results:
    """Send all requests, and wait for all answers.

    Args:
        model: as the server names it; None: the only one that it has.
        load: server, and how requests come.
        requests: what they are.

    Raises:
        ServerError: there is no server, or not this model, or no request was answered.
    """
    return asyncio.run(_measure(model, load, requests))


async def _measure(model: str | None, load: ServeSettings, requests: PromptSettings) -> Results:
    import httpx2
    from tqdm import tqdm

    key = load.api_key or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    # No proxies and no settings of the environment: they would be measured, too.
    async with httpx2.AsyncClient(
        headers=headers, limits=limits, timeout=load.request_timeout, trust_env=load.url.startswith("https")
    ) as client:
        server = _Server(client=client, url=load.url, model=await _served(client, load.url, model))
        prompts = Prompts(requests, load.seed)
        bodies = [
            _body(server, prompts.conversation(i, as_urls=True), requests) for i in range(load.num_prompts)
        ]
        for i in range(load.num_warmups):
            extra = prompts.conversation(load.num_prompts + i, as_urls=True)
            await _first(server, _body(server, extra, requests))
        started = time.monotonic()
        watch = _Watch()
        with tqdm(total=load.num_prompts, desc="requests", unit="request") as bar:
            found = await _all(server, bodies, load, started, watch, bar)
        duration = time.monotonic() - started
    timings = [one for one in found if isinstance(one, Timing)]
    failures = [one for one in found if isinstance(one, str)]
    if not timings:
        raise ServerError(f"no request was answered; the first one failed with: {failures[0]}")
    return Results(
        kind="serve",
        model=server.model,
        settings={},
        duration=duration,
        timings=timings,
        failures=failures,
        more={"request_rate": load.request_rate, "most_at_a_time": watch.most},
    )


class _Watch:
    """How many requests wait for an answer, and how many did at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        self.now -= 1


async def _all(
    server: _Server, bodies: list[bytes], load: ServeSettings, started: float, watch: _Watch, bar: Any
) -> list[Timing | str]:
    room = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else nullcontext()

    async def ask(body: bytes) -> Timing | str:
        async with room:
            with watch:
                try:
                    return await _ask(server, body, started)
                except RequestFailedError as error:
                    return str(error)
                finally:
                    bar.update()

    tasks = []
    async for number in _arrivals(load, started):
        tasks.append(asyncio.create_task(ask(bodies[number])))
    return await asyncio.gather(*tasks)


async def _arrivals(load: ServeSettings, started: float) -> AsyncIterator[int]:
    """Numbers of requests, each when its time has come: gaps are gamma-distributed, with a mean of 1/rate."""
    times = arrival_times(load)
    for number, at in enumerate(times):
        await asyncio.sleep(max(0.0, started + at - time.monotonic()))
        yield number


def arrival_times(load: ServeSettings) -> list[float]:
    """Seconds from the start on at which requests are sent; the first one is sent at once."""
    if math.isinf(load.rate):
        return [0.0] * load.num_prompts
    source = np.random.default_rng([load.seed, 2])
    shape = load.burstiness
    gaps = source.gamma(shape, 1 / (load.rate * shape), load.num_prompts - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


async def _served(client: httpx2.AsyncClient, url: str, model: str | None) -> str:
    import httpx2

    try:
        response = await client.get(f"{url}/models")
    except httpx2.TransportError as error:
        raise ServerError(
            f"no server answers at {url} ({type(error).__name__}); start one with opsin serve MODEL, or say "
            "where it is with --base-url"
        ) from None
    if response.status_code in (401, 403):
        raise ServerError(f"{url} asks for an API key; pass --api-key or set OPENAI_API_KEY")
    if response.status_code != 200:
        raise ServerError(f"{url}/models answers {response.status_code}: {_short(response.text)}")
    try:
        names = [str(entry["id"]) for entry in response.json()["data"]]
    except (KeyError, TypeError, ValueError):
        raise ServerError(f"{url}/models does not answer as OpenAI's API does; check --base-url") from None
    if model is None and len(names) == 1:
        return names[0]
    if model not in names:
        asked = "say which model" if model is None else f"it does not serve {model!r}"
        raise ServerError(f"{url}: {asked}; it has: {', '.join(names) or 'none'}")
    return model


def _body(server: _Server, conversation: Conversation, requests: PromptSettings) -> bytes:
    fields: dict[str, Any] = {
        "model": server.model,
        "messages": conversation,
        "max_tokens": requests.output_len,
        "temperature": requests.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if requests.ignore_eos:
        fields["ignore_eos"] = True
    return json.dumps(fields).encode()


async def _first(server: _Server, body: bytes) -> None:
    """A warm-up: what fails here would fail every time."""
    try:
        await _ask(server, body, time.monotonic())
    except RequestFailedError as error:
        hint = "; --no-ignore-eos leaves out what servers other than opsin and vLLM may refuse"
        raise ServerError(
            f"the first request failed: {error}{hint if 'ignore_eos' in str(error) else ''}"
        ) from None


async def _ask(server: _Server, body: bytes, started: float) -> Timing:
    import httpx2

    headers = {"Content-Type": "application/json"}
    sent = time.monotonic()
    pieces: list[float] = []
    usage: Mapping[str, Any] | None = None
    finished = False
    try:
        async with server.client.stream(
            "POST", f"{server.url}/chat/completions", content=body, headers=headers
        ) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise RequestFailedError(f"status {response.status_code}: {_message(text)}")
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                now, data = time.monotonic(), line[5:].strip()
                if data == "[DONE]":
                    finished = True
                    break
                event = _event(data)
                usage = event.get("usage") or usage
                if any(_has_text(choice) for choice in event.get("choices", ())):
                    pieces.append(now)
    except httpx2.TimeoutException:
        raise RequestFailedError("no answer in time; --request-timeout allows more") from None
    except httpx2.TransportError as error:
        raise RequestFailedError(f"the connection failed: {type(error).__name__}") from None
    ended = time.monotonic()
    if not finished:
        raise RequestFailedError("the server broke off the stream")
    counted = usage or {}
    return Timing(
        arrival=sent - started,
        first_token=pieces[0] - sent if pieces else None,
        gaps=[after - before for before, after in itertools.pairwise(pieces)],
        total=ended - sent,
        num_prompt_tokens=int(counted.get("prompt_tokens", 0)),
        num_output_tokens=int(counted.get("completion_tokens", len(pieces))),
    )


def _event(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        raise RequestFailedError(f"the server sent an event that is not JSON: {_short(data)}") from None
    if not isinstance(event, dict):
        raise RequestFailedError(f"the server sent an event that is no object: {_short(data)}")
    if error := event.get("error"):
        raise RequestFailedError(_message(json.dumps({"error": error})))
    return event


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))


def _message(text: str) -> str:
    """The server's own words in OpenAI's form of an error, or what it sent."""
    try:
        error = json.loads(text)["error"]
        return _short(str(error["message"] if isinstance(error, Mapping) else error))
    except (KeyError, TypeError, ValueError):
        return _short(text)


def _short(text: str) -> str:
    return " ".join(text.split())[:_SHOWN_ERROR] or "an empty answer"


def check_needed() -> None:
    """Raises:
    ConfigError: the HTTP client is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("httpx2") is None:
        raise ConfigError("opsin bench serve needs httpx2; pip install 'opsin[serve]'")
