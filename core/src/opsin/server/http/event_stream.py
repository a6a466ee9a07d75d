"""Server-sent events: chunks as they are made, then ``data: [DONE]``."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel, RootModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from opsin.server.http.disconnect import ClientGone, while_connected
from opsin.server.http.errors import ApiError, api_error

logger = logging.getLogger(__name__)


class EventStream(Response):
    """Streams chunks. Ends the work when the client disconnects; waits for clients that read slowly."""

    media_type = "text/event-stream"

    def __init__(self, first: BaseModel, rest: AsyncGenerator[BaseModel, None], request_id: str) -> None:
        """``first`` was taken from ``rest`` already: whatever is wrong with a request is known by then."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._request_id = request_id

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        async with aclosing(self._rest):
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _send_event(send, self.event(self._first))
        try:
            async for chunk in self._rest:
                await _send_event(send, self.event(chunk))
        except ClientGone:
            raise
        except Exception as error:
            answer = api_error(error, self._request_id)
            if answer.status >= 500:
                logger.exception("request %s failed while it was streamed", self._request_id)
            await _send_event(send, self.failure(answer))
        if (last := self.end()) is not None:
            await _send_event(send, last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def event(self, chunk: BaseModel) -> str:
        """The lines of an event, without the empty one at its end."""
        return f"data: {chunk.model_dump_json(exclude_unset=True)}"

    def failure(self, error: ApiError) -> str:
        """The event of a request that fails on the way."""
        return f"data: {error.body().model_dump_json()}"

    def end(self) -> str | None:
        """The last event, if there is one after the last chunk."""
        return "data: [DONE]"


class NamedEventStream(EventStream):
    """Events with names, those of their ``type``, as OpenAI's Responses and Anthropic's Messages send."""

    def event(self, chunk: BaseModel) -> str:
        """See `EventStream.event`."""
        named = chunk.root if isinstance(chunk, RootModel) else {}
        return f"event: {named.get('type', 'message')}\n{super().event(chunk)}"

    def failure(self, error: ApiError) -> str:
        """See `EventStream.failure`."""
        detail = error.body().error
        told: dict[str, Any] = {"type": "error", "code": str(detail.code), "param": detail.param}
        told |= {"message": detail.message, "error": {"type": "api_error", "message": detail.message}}
        return f"event: error\ndata: {json.dumps(told)}"

    def end(self) -> str | None:
        """See `EventStream.end`."""
        return None


async def _send_event(send: Send, text: str) -> None:
    body = b"%b\n\n" % text.encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
