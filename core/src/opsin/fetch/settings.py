"""What the server fetches for its clients, and how much of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

from opsin.config import MediaLimits
from opsin.errors import ConfigError
from opsin.fields import Positive, check_fields


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    """What the server fetches for its clients, and how much of it.

    Pictures and videos:
        allowed_local_media_path: folder whose files ``file://`` URLs may name. Default: none.
        allowed_media_domains: the only hosts to fetch from. They narrow what is allowed, never widen it.
            Default: any.
        allow_private_media: networks in CIDR form (10.20.0.0/16) whose addresses may be fetched from, though
            they are not on the public internet: a company's picture store. Default: none.
        allow_loopback_media: lets URLs lead to this machine, for tests.
        enable_mm_embeds: whether requests may bring ready-made embeddings.
        image_fetch_timeout: seconds for one fetch, from resolving the name to the last byte. Also as
            VLLM_IMAGE_FETCH_TIMEOUT.
        max_request_media_bytes: most bytes of all that is fetched for one request.

    Attributes:
        max_media_bytes: bytes of one item; the engine's setting of this name.
        max_redirects: redirects that one fetch follows.
        max_concurrent: fetches at a time, of all requests.
        max_concurrent_per_request: fetches at a time, of one request.
    """

    allowed_local_media_path: Path | None = None
    allowed_media_domains: Sequence[str] | None = None
    allow_private_media: Sequence[str] = ()
    allow_loopback_media: bool = False
    enable_mm_embeds: bool = False
    image_fetch_timeout: float = 5.0
    max_request_media_bytes: Positive = 256 * 2**20
    max_media_bytes: Positive = MediaLimits.max_media_bytes
    max_redirects: int = 5
    max_concurrent: Positive = 32
    max_concurrent_per_request: Positive = 8

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.image_fetch_timeout < math.inf:
            raise ConfigError(
                f"image_fetch_timeout={self.image_fetch_timeout}: expected seconds, greater than 0"
            )
        _ = self.private_networks
        if self.allowed_local_media_path is not None and not self.allowed_local_media_path.is_dir():
            raise ConfigError(
                f"allowed_local_media_path={str(self.allowed_local_media_path)!r} is not a folder"
            )

    @property
    def private_networks(self) -> list[IPv4Network | IPv6Network]:
        """``allow_private_media`` as networks.

        Raises:
            ConfigError: one of them is none, or is so wide that it would open everything.
        """
        found = []
        for text in self.allow_private_media:
            try:
                network = ip_network(text)
            except ValueError as error:
                raise ConfigError(
                    f"allow_private_media={text!r}: expected a network, such as 10.20.0.0/16 ({error})"
                ) from None
            if network.prefixlen < (8 if network.version == 4 else 16):
                raise ConfigError(f"allow_private_media={text!r}: so wide a network opens everything inside")
            found.append(network)
        return found
