"""A request's body -> a checked model, within the byte limit; what is wrong with it in the client's terms."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from opsin.server.http.disconnect import ClientGone
from opsin.server.http.errors import ApiError, bad_request
from opsin.server.schema.strict import MAX_FAULTS, plain

M = TypeVar("M", bound=BaseModel)

logger = logging.getLogger(__name__)

_MAX_JSON_VALUES = 2_000_000
"""Most values in a body. pydantic holds the interpreter's lock while it parses, so everything else waits:
0.1 s for that many, some seconds for 64 MB of ``[{},{},...]``."""

_ON_THE_LOOP_BYTES = 64 * 1024
"""Bodies up to this size are parsed in place; larger ones on a thread."""

_DRAINED_LIMITS = 8
"""Up to this many times the limit is read and discarded: a client that reads only after it has sent
everything gets the answer instead of a broken connection."""

_SLOWEST = 16 * 1024
"""Bytes per second at which a body may come that takes longer than the time-out."""

_MOST_IGNORED = 32
"""Most unknown fields of a body that are ignored: each costs another look at the whole."""

_TAGS = frozenset({"as_text", "as_parts"})
"""Alternatives of a union in pydantic's locations; the client has no such fields. "as_parts" is followed by
an index and the type of the part."""


async def read_body(
    request: Request, model: type[M], *, max_bytes: int, timeout_s: float, ignore_unknown: bool = False
) -> M:
    """The body of a request as a model. Its ticket is admitted when the body is complete.

    Args:
        request: with a ``ticket`` in its state.
        model: what the body should be.
        max_bytes: most bytes.
        timeout_s: seconds that a body may take at least; large ones have longer (`_SLOWEST`).
        ignore_unknown: as in `validated`.

    Raises:
        ApiError: too large, too slow, not JSON, or refused by the model; or the server is full. The error
            does not repeat the input.
        ClientGone: the client disconnected while sending.
    """
    data = await read_bytes(request, max_bytes=max_bytes, timeout_s=timeout_s)
    if len(data) <= _ON_THE_LOOP_BYTES:
        return validated(model, data, ignore_unknown)
    return await asyncio.to_thread(validated, model, data, ignore_unknown)


async def read_bytes(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The body of a request as it came; see `read_body`.

    Raises:
        ApiError: it is no JSON according to its header, too large, or too slow; or the server is full.
        ClientGone: the client disconnected while sending.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps other sites' pages from posting here: this type needs their browser's preflight.
        raise ApiError(415, "expected Content-Type: application/json")
    try:
        data = await _read(request, max_bytes, timeout_s)
    except ClientDisconnect:
        raise ClientGone from None
    request.state.ticket.admit()
    return data


def validated(model: type[M], data: bytes, ignore_unknown: bool = False) -> M:
    """A body as a model.

    Args:
        model: what the body should be.
        data: JSON.
        ignore_unknown: leave out fields that the model does not know, and say so in the log, where there is
            nothing else to find fault with.

    Raises:
        ApiError: it is not JSON, or refused by the model.
    """
    # Base64 and most text hold none of these; what looks like more values than it is, is no prompt either.
    if len(data) > _MAX_JSON_VALUES and sum(map(data.count, (b",", b"{", b"["))) > _MAX_JSON_VALUES:
        raise bad_request(f"the body has too many values; at most {_MAX_JSON_VALUES} are accepted")
    ignored: list[str] = []
    while True:
        try:
            found = model.model_validate_json(data)
        except ValidationError as error:
            # A list's first fault ends its check, so there may be more behind it.
            faults = error.errors(include_url=False, include_input=False)
            others = any(fault["type"] != "extra_forbidden" for fault in faults)
            if not ignore_unknown or others or len(ignored) >= _MOST_IGNORED:
                raise refused(error) from None
        else:
            if ignored:
                logger.warning("fields that are not known are ignored: %s", ", ".join(ignored))
            return found
        body = json.loads(data)
        for fault in faults:
            _drop(body, fault["loc"])
        data = json.dumps(body).encode()
        ignored += [_place(fault["loc"]) for fault in faults]


def _drop(body: Any, loc: Sequence[int | str]) -> None:
    """Take out what stands at a place."""
    *path, name = _steps(loc)
    for step in path:
        body = body[step]
    body.pop(name, None)


async def _read(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    announced = request.headers.get("content-length", "")
    announced_bytes = int(announced) if announced.isdigit() else 0
    too_large = announced_bytes > max_bytes
    hopeless = announced_bytes > _DRAINED_LIMITS * max_bytes
    pieces: list[bytes] = []
    size = 0
    started = time.monotonic()
    async with aclosing(request.stream()) as stream:
        while not hopeless:
            left_s = started + timeout_s + size / _SLOWEST - time.monotonic()
            try:
                piece = await asyncio.wait_for(anext(stream), left_s)
            except StopAsyncIteration:
                break
            except asyncio.TimeoutError:
                message = (
                    f"the body did not come in time ({size} bytes in {time.monotonic() - started:.0f} s)"
                )
                raise ApiError(408, message, closes=True) from None
            size += len(piece)
            if size > max_bytes:
                too_large = True
                pieces.clear()
            if not too_large:
                request.state.ticket.received(len(piece))
                pieces.append(piece)
            else:
                hopeless = size > _DRAINED_LIMITS * max_bytes
    if too_large:
        raise ApiError(
            413,
            f"the request's body is too large; at most {max_bytes} bytes are accepted (--max-body-bytes)",
            closes=True,
        )
    return b"".join(pieces)


def refused(error: ValidationError) -> ApiError:
    """What is wrong with a body, in the client's terms."""
    faults = error.errors(include_url=False, include_input=False)
    described = list(dict.fromkeys(_described(fault) for fault in faults))
    more = len(described) - MAX_FAULTS
    message = "; ".join(described[:MAX_FAULTS]) + (f"; and {more} more" if more > 0 else "")
    param = faults[0].get("ctx", {}).get("param") or _place(faults[0]["loc"]) or None
    return bad_request(message, param)


def _described(fault: Any) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        text = "unknown field"
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = context.get("expected_tags") or "a known type"
        text = f'unknown or missing "type"; expected one of {tags}'
    elif kind == "value_error":
        text = str(context.get("error", "invalid"))
    elif kind == "json_invalid":
        text = f"the body is not valid JSON: {context.get('error', 'invalid')}"
    else:
        text = fault["msg"][:1].lower() + fault["msg"][1:]
    place = _place(fault["loc"])
    return f"{place}: {text}" if place else text


def _place(loc: Sequence[int | str]) -> str:
    """``messages[0].content[1].text``."""
    place = ""
    for step in _steps(loc):
        if isinstance(step, int):
            place += f"[{step}]"
        else:
            place += f".{plain(step)}" if place else plain(step)
    return place[:200]


def _steps(loc: Sequence[int | str]) -> list[int | str]:
    """A place without the alternatives of unions, which pydantic names among the steps."""
    return [
        step
        for position, step in enumerate(loc)
        if isinstance(step, int)
        or (step not in _TAGS and not (position > 1 and loc[position - 2] == "as_parts"))
    ]
