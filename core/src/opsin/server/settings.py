"""What the server is told at start-up, beyond what the engine is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from opsin.config import MAX_LOGPROBS
from opsin.errors import ConfigError
from opsin.server.fetch.settings import FetchSettings


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may ask for, and how many requests there may be.

    Attributes:
        body_bytes: of a request's body.
        parts: content parts of all messages together.
        inputs: prompts of a completion, texts of an embedding request.
        n: samples of one prompt.
        stop: stop strings.
        logprobs: alternatives per token.
        waiting: requests beyond those computed at a time; more get 429.
    """

    body_bytes: int = 64 * 2**20
    parts: int = 1024
    inputs: int = 1024
    n: int = 64
    stop: int = 4
    logprobs: int = MAX_LOGPROBS
    waiting: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < (0 if name in ("stop", "logprobs", "waiting") else 1):
                raise ConfigError(f"limit {name}={value}: expected more")
        if self.logprobs > MAX_LOGPROBS:
            raise ConfigError(f"--max-logprobs={self.logprobs}: expected at most {MAX_LOGPROBS}")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of the HTTP side.

    Attributes:
        served_model_names: names clients may use; none: the model as the engine was told.
        api_keys: any of them opens; none: open to all.
        limits: of requests.
        fetch: what is fetched for clients.
        trust_request_chat_template: requests may bring a chat template of their own.
        allowed_origins: web pages of these origins may call the server; none: of no other origin.
        root_path: prefix under which a proxy shows the server.
        ui: serve the playground page.
        shutdown_timeout_s: how long accepted requests may go on after SIGTERM; None: to their end.
    """

    served_model_names: Sequence[str] = ()
    api_keys: Sequence[str] = ()
    limits: RequestLimits = field(default_factory=RequestLimits)
    fetch: FetchSettings = field(default_factory=FetchSettings)
    trust_request_chat_template: bool = False
    allowed_origins: Sequence[str] = ()
    root_path: str = ""
    ui: bool = True
    shutdown_timeout_s: float | None = None

    def __post_init__(self) -> None:
        if not all(self.api_keys):
            raise ConfigError("--api-key is empty; expected a key, or leave it out")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"--root-path={self.root_path!r}: expected /prefix")
