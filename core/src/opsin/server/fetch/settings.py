"""What the server fetches for its clients, and how much of it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opsin.errors import ConfigError

TIMEOUT_VARIABLES = ("OPSIN_IMAGE_FETCH_TIMEOUT", "VLLM_IMAGE_FETCH_TIMEOUT")
"""Environment variables with the deadline of a fetch in seconds; the first that is set counts."""


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    """What the server fetches for its clients, and how much of it.

    Attributes:
        timeout_s: deadline of one fetch from resolving the name to the last byte.
        timeout_variable: name of the setting that a missed deadline names.
        max_bytes: of one item.
        max_request_bytes: of all fetched items of one request.
        max_redirects: that one fetch follows.
        max_concurrent: fetches at a time, of all requests.
        max_concurrent_per_request: fetches at a time, of one request.
        allowed_domains: the only hosts to fetch from; None: any. They narrow what is allowed, never widen it.
        allow_loopback: lets URLs lead to this machine, for tests.
        local_root: the folder whose files ``file://`` URLs may name; None: none.
        accept_embeds: whether requests may bring ready-made embeddings.
    """

    timeout_s: float = 5.0
    timeout_variable: str = TIMEOUT_VARIABLES[0]
    max_bytes: int = 64 * 2**20
    max_request_bytes: int = 256 * 2**20
    max_redirects: int = 5
    max_concurrent: int = 32
    max_concurrent_per_request: int = 8
    allowed_domains: Sequence[str] | None = None
    allow_loopback: bool = False
    local_root: Path | None = None
    accept_embeds: bool = False

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_request_bytes", "max_concurrent", "max_concurrent_per_request"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        if not (self.timeout_s > 0 and math.isfinite(self.timeout_s)):
            raise ConfigError(f"{self.timeout_variable}={self.timeout_s}: expected seconds, more than 0")
        if self.local_root is not None and not self.local_root.is_dir():
            raise ConfigError(f"--allowed-local-media-path={str(self.local_root)!r} is not a folder")


def timeout_from_environment(environment: Mapping[str, str] = os.environ) -> tuple[float, str]:
    """The deadline of a fetch in seconds, and the variable that sets it.

    Raises:
        ConfigError: the variable is set to something else than a positive number.
    """
    for name in TIMEOUT_VARIABLES:
        text = environment.get(name)
        if text:
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name}={text!r}: expected seconds, a number more than 0")
            return value, name
    return FetchSettings.timeout_s, TIMEOUT_VARIABLES[0]
