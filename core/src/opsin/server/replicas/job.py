"""What a replica is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from opsin.config import EngineConfig
from opsin.server.settings import ServerSettings


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a replica is told.

    Attributes:
        config: the engine's, the same for all.
        settings: of its server.
        number, count: its place among the replicas.
        socket: path of its Unix socket.
    """

    config: EngineConfig
    settings: ServerSettings
    number: int
    count: int
    socket: str
