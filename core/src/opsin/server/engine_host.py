"""Loads the engine on its own thread while the server already answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from opsin.async_engine import AsyncEngine
from opsin.config import EngineConfig
from opsin.engine.engine import Engine
from opsin.errors import ConfigError
from opsin.params import PoolingParams, SamplingParams, StructuredOutput
from opsin.server.http.errors import ApiError

logger = logging.getLogger(__name__)

_RETRY_LOADING_S = 5


class Host(Protocol):
    """What runs the model behind an `opsin.server.app.App`.

    Attributes:
        config: settings of the engine.
    """

    config: EngineConfig

    @property
    def loading(self) -> bool:
        """Whether a thread of this process is loading."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """Why there is no model, or no more; None while all is well."""
        ...

    def start(self) -> None:
        """Begin to load."""
        ...

    def engine(self) -> AsyncEngine:
        """The engine in this process.

        Raises:
            ApiError: 503: there is none at the moment.
        """
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class EngineHost:
    """Holds the engine while it is loading, ready, failed or closed.

    Attributes:
        config: settings of the engine.
    """

    def __init__(self, config: EngineConfig, build: Callable[[EngineConfig], Engine] = Engine) -> None:
        """``build`` makes the engine, on the thread."""
        self.config = config
        self._build = build
        self._engine: AsyncEngine | None = None
        self._failure: BaseException | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._load, name="opsin-load", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until the engine is loaded, or loading has failed."""
        self._done.wait()

    @property
    def loading(self) -> bool:
        """Whether the thread is still running."""
        return self._thread.is_alive()

    @property
    def failure(self) -> BaseException | None:
        """Why loading failed, or what ended the engine; None while all is well."""
        return self._failure or (self._engine.death if self._engine is not None else None)

    def engine(self) -> AsyncEngine:
        """The engine.

        Raises:
            ApiError: 503 while it is loading, or after it has failed.
        """
        if self.failure is not None:
            raise ApiError(503, "the engine has failed; the server has to restart")
        if self._engine is None:
            raise ApiError(503, "the model is loading", retry_after_s=_RETRY_LOADING_S)
        return self._engine

    def close(self) -> None:
        """Stop the engine, aborting what runs."""
        if self._engine is not None and self._engine.death is None:
            self._engine.close()

    def _load(self) -> None:
        try:
            started = time.monotonic()
            engine = self._build(self.config)
            if self.config.task == "generate" and engine.frontend.renderer.template is None:
                raise ConfigError(
                    "this model has no chat template; pass one with --chat-template FILE (or its Jinja text)"
                )
            _warm_up(engine)
            self._engine = AsyncEngine(engine)
            logger.info("%s is ready after %.1f s", self.config.model, time.monotonic() - started)
            if engine.info.default_params().top_k == 1:
                logger.info(
                    "sampling: generation_config has top_k 1, so temperature and n change nothing unless a "
                    "request sets top_k; --generation-config vllm or --override-generation-config top_k=0 "
                    "leaves it out"
                )
        except BaseException as error:
            logger.debug("loading failed", exc_info=True)
            self._failure = error
        finally:
            self._done.set()


def _warm_up(engine: Engine) -> None:
    """Run a first request and build a first grammar, so that no user waits for what is built only once."""
    params: SamplingParams | PoolingParams = PoolingParams()
    if engine.config.task == "generate":
        engine.frontend.grammars.compile(StructuredOutput(json_object=True))
        params = SamplingParams(max_tokens=2, ignore_eos=True)
    engine.add("warm-up", engine.frontend.processor.process([0], min_new_tokens=0), params)
    while engine.has_unfinished():
        engine.step()
