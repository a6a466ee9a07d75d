"""Server-sent events: chunks as they are made, then ``data: [DONE]``."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from opsin.server.http.disconnect import ClientGone, while_connected
from opsin.server.http.errors import api_error

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
        await _send_event(send, self._first.model_dump_json(exclude_unset=True))
        try:
            async for chunk in self._rest:
                await _send_event(send, chunk.model_dump_json(exclude_unset=True))
        except ClientGone:
            raise
        except Exception as error:
            answer = api_error(error, self._request_id)
            if answer.status >= 500:
                logger.exception("request %s failed while it was streamed", self._request_id)
            await _send_event(send, answer.body().model_dump_json())
        await _send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, text: str) -> None:
    body = b"data: %b\n\n" % text.encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
