"""Runs the rows of a job through a model: many at a time, in bounded memory, each with its own fault."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Iterable, Iterator
from itertools import islice, takewhile
from typing import Any

from pydantic import BaseModel

from opsin.errors import DeviceLostError
from opsin.server.answers.chat import ChatCompletions
from opsin.server.answers.completions import Completions
from opsin.server.answers.embeddings import Embeddings
from opsin.server.batch.output import answer_line, error_line
from opsin.server.batch.rows import CHAT, COMPLETIONS, Row
from opsin.server.http.body import validated
from opsin.server.http.errors import ApiError, api_error
from opsin.server.schema.chat import ChatRequest
from opsin.server.schema.prompts import CompletionRequest, EmbeddingRequest
from opsin.server.serving import Serving

logger = logging.getLogger(__name__)

_READ_AT_ONCE = 16
"""Rows that are read from their source at a time, on a thread."""

_WINDOW = 8
"""With the order kept, how many times as many rows may be finished or under way as are computed at once."""


class Line:
    """A row's line of output."""

    def __init__(self, text: bytes, *, failed: bool) -> None:
        self.text, self.failed = text, failed


async def answer(serving: Serving, row: Row) -> Line:
    """The line of one row. Whatever is wrong with it is in the line.

    Raises:
        OpsinError: the engine has stopped: no row can be answered any more.
    """
    try:
        if row.error:
            raise ApiError(400, row.error)
        made = await _create(serving, row)
        body = made.model_dump_json(exclude_unset=True)
        return Line(answer_line(row.custom_id, body), failed=False)
    except Exception as error:
        if serving.engine.death is not None or isinstance(error, DeviceLostError):
            raise
        told = api_error(error, row.custom_id)
        if told.status == 500:
            logger.exception("row %s failed", row.custom_id)
        return Line(error_line(row.custom_id, told), failed=True)


def _create(serving: Serving, row: Row) -> Awaitable[BaseModel]:
    ignore = serving.settings.limits.unknown_fields == "ignore"
    if row.route == CHAT:
        return ChatCompletions(serving).create(_whole(validated(ChatRequest, row.body, ignore)))
    if row.route == COMPLETIONS:
        return Completions(serving).create(_whole(validated(CompletionRequest, row.body, ignore)))
    return Embeddings(serving).create(validated(EmbeddingRequest, row.body, ignore))


def _whole(request: Any) -> Any:
    if request.stream:
        raise ApiError(400, "a row of a batch is not streamed; leave stream out", param="stream")
    return request


async def lines(
    serving: Serving, rows: Iterable[Row], *, at_once: int, keep_order: bool = False
) -> AsyncGenerator[Line, None]:
    """The lines of all rows: as they are finished, or in the rows' order.

    Args:
        serving: the model.
        rows: read on a thread, as they are needed.
        at_once: rows under way at a time.
        keep_order: whether lines come in the order of the rows.

    Raises:
        OpsinError: the engine has stopped, or the source cannot be read on.
    """
    source, pending = _Source(rows), dict[int, asyncio.Task[Line]]()
    number, ended = 0, False
    try:
        while True:
            while not ended and _under_way(pending) < at_once and len(pending) < _WINDOW * at_once:
                row = await source.next()
                if row is None:
                    ended = True
                else:
                    pending[number] = asyncio.create_task(answer(serving, row))
                    number += 1
            if not pending:
                return
            await asyncio.wait(
                [task for task in pending.values() if not task.done()] or list(pending.values()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            finished = takewhile if keep_order else filter  # `pending` is in the order of the rows
            done = list(finished(lambda index: pending[index].done(), pending))
            for index in done:
                yield pending.pop(index).result()
    finally:
        for task in pending.values():
            task.cancel()
        await asyncio.gather(*pending.values(), return_exceptions=True)


def _under_way(pending: dict[int, asyncio.Task[Line]]) -> int:
    return sum(not task.done() for task in pending.values())


class _Source:
    """Rows, read some at a time on a thread: a file may be slow, and a parquet file has to be decoded."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: Iterator[Row] = iter(rows)
        self._read: list[Row] = []

    async def next(self) -> Row | None:
        """The next row; None after the last."""
        if not self._read:
            self._read = await asyncio.to_thread(lambda: list(islice(self._rows, _READ_AT_ONCE)))
            self._read.reverse()
        return self._read.pop() if self._read else None
