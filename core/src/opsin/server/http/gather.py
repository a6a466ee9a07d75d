"""Several streams as one; when one fails, all are ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all streams as they come, each with its stream's number."""
    if len(streams) == 1:  # the usual case, without a task for each item
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return

    async def next_of(number: int) -> tuple[int, T] | None:
        try:
            return number, await anext(streams[number])
        except StopAsyncIteration:
            return None

    waiting = {asyncio.ensure_future(next_of(number)) for number in range(len(streams))}
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                found = task.result()
                if found is not None:
                    yield found
                    waiting.add(asyncio.ensure_future(next_of(found[0])))
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
