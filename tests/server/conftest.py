"""Servers that the tests share: starting one takes longer than asking it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from opsin import EngineConfig
from opsin.cli import main
from opsin.fetch.settings import FetchSettings
from opsin.server import run as run_module
from opsin.server.settings import Listen, RequestLimits, ServerSettings
from tests.server.in_thread import Running, golden_config, running

Parsed = tuple[EngineConfig, ServerSettings, Listen]
Parse = Callable[..., Parsed]

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """Answers with the recorded (random) Qwen2-VL model."""
    config = golden_config(limit_mm_per_prompt={"image": 3, "video": 1}, seed=0)
    settings = ServerSettings(
        served_model_name=("golden", "golden-too"),
        fetch=FetchSettings(allow_loopback_media=True, image_fetch_timeout=1),
        limits=RequestLimits(max_body_bytes=8 * 2**20, max_n=4, max_inputs=8, max_parts=20),
    )
    with running(config, settings) as started:
        yield started


@pytest.fixture(scope="session")
def embedder() -> Iterator[Running]:
    """Embeds with the same model, as dse models do."""
    config = golden_config(task="embed", chat_template=str(EXAMPLES / "template_dse_qwen2_vl.jinja"))
    settings = ServerSettings(served_model_name=("dse",), limits=RequestLimits(max_inputs=8))
    with running(config, settings) as started:
        yield started


@pytest.fixture(scope="session")
def client(server: Running) -> openai.OpenAI:
    """OpenAI's client for `server`."""
    return server.client()


@pytest.fixture(autouse=True)
def _idle_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a request behind, and none a block of the cache."""
    started: Running | None = request.getfixturevalue("server") if "server" in request.fixturenames else None
    yield
    if started is not None:
        started.wait_idle()
        assert started.engine.stats().kv_blocks_used == 0


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """What a command line asks for, without serving it."""
    for name in ("OPSIN_API_KEY", "VLLM_API_KEY", "OPSIN_IMAGE_FETCH_TIMEOUT", "VLLM_IMAGE_FETCH_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)

    def parse(*arguments: str) -> Parsed:
        asked: list[Parsed] = []
        monkeypatch.setattr(run_module, "serve", lambda *given: asked.append(given) or 0)
        with pytest.raises(SystemExit) as ended:
            main(["serve", *arguments])
        assert ended.value.code == 0, "a usage error"
        return asked[0]

    return parse
