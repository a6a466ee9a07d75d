"""Which replica a request goes to: the one that has seen its picture, or its beginning, unless it is busy."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

_PICTURE = re.compile(
    rb'"(?:image_url|video_url|image_embeds|input_image)"\s*:\s*(?:\{[^{}"]*"url"\s*:\s*)?"([^"]*)"'
)
_TEXT = re.compile(rb'"(?:messages|prompt|input)"\s*:')

_SAMPLE_BYTES = 4096
"""Of a picture that is in the request itself, so much of its beginning, middle and end tells it apart."""

_PREFIX_BYTES = 512

_SPARE = 4
_UNEVEN = 1.5
"""A replica may have so many times as many requests as all have on average, and some more, before others take
what would be its own (Mirrokni et al. 2018, consistent hashing with bounded loads)."""


def affinity(body: bytes) -> bytes:
    """What requests that should meet in one cache have in common: the first picture, else the beginning."""
    found = _PICTURE.search(body)
    if found is None:
        begin = _TEXT.search(body)
        start = 0 if begin is None else begin.end()
        return b"text" + body[start : start + _PREFIX_BYTES]
    start, end = found.span(1)
    places = (start, (start + end) // 2, max(start, end - _SAMPLE_BYTES))
    parts = [body[at : min(at + _SAMPLE_BYTES, end)] for at in places]
    return b"picture%d" % (end - start) + b"".join(parts)


def choose(key: bytes, loads: Mapping[int, int]) -> int:
    """The replica for a request.

    Every replica has a place in an order that depends on the key only (rendezvous hashing: Thaler and
    Ravishankar 1998), so that a replica that ends or returns moves no keys of others.

    Args:
        key: see `affinity`.
        loads: replica -> requests it has; at least one replica.
    """
    limit = _UNEVEN * (sum(loads.values()) + 1) / len(loads) + _SPARE
    order = sorted(loads, key=lambda replica: _score(key, replica), reverse=True)
    if loads[order[0]] < limit:
        return order[0]
    return min(order, key=lambda replica: loads[replica])


def _score(key: bytes, replica: int) -> bytes:
    return hashlib.blake2b(key, digest_size=8, salt=replica.to_bytes(4, "little")).digest()
