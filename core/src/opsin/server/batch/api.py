"""``/v1/files`` and ``/v1/batches``: OpenAI's batch API over the rows and answers of `opsin batch`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response

from opsin.errors import OpsinError
from opsin.server.batch.job import left
from opsin.server.batch.output import Output
from opsin.server.batch.rows import Row, Source
from opsin.server.batch.runner import lines
from opsin.server.batch.store import Store
from opsin.server.http.body import read_body
from opsin.server.http.disconnect import ClientGone
from opsin.server.http.errors import ApiError, bad_request
from opsin.server.schema.strict import RequestBody
from opsin.server.serving import Serving
from opsin.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_SAVED_EVERY = 20
"""Rows after which a job's counts are written down."""

_LISTED = 20


class BatchRequest(RequestBody):
    """The body of ``POST /v1/batches``."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/embeddings", "/v1/completions"]
    completion_window: str = "24h"
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None


class BatchApi:
    """The routes, and the task that works jobs off, one after another."""

    def __init__(self, folder: Path, settings: ServerSettings, serving: Callable[[], Serving]) -> None:
        """``serving`` raises ApiError until the model is loaded."""
        self._store, self._settings, self._serving = Store(folder), settings, serving
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._current: tuple[str, asyncio.Task[None]] | None = None
        self._working: asyncio.Task[None] | None = None

    def add_to(self, api: FastAPI) -> None:
        """Add the routes to an application."""
        for method, path, endpoint in (
            ("POST", "/v1/files", self.upload),
            ("GET", "/v1/files", self.files),
            ("GET", "/v1/files/{file_id}", self.file),
            ("GET", "/v1/files/{file_id}/content", self.content),
            ("DELETE", "/v1/files/{file_id}", self.delete),
            ("POST", "/v1/batches", self.create),
            ("GET", "/v1/batches", self.batches),
            ("GET", "/v1/batches/{batch_id}", self.batch),
            ("POST", "/v1/batches/{batch_id}/cancel", self.cancel),
        ):
            api.add_api_route(path, endpoint, methods=[method], response_model=None)

    def start(self) -> None:
        """Begin to work, with what an earlier server has left. On the event loop."""
        for batch in self._store.unfinished():
            self._queue.put_nowait(batch["id"])
        self._working = asyncio.create_task(self._work())

    async def aclose(self) -> None:
        """Stop working; what is begun goes on with the next server."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)

    # ---- files --------------------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        """Keep a file."""
        most = self._settings.max_file_bytes
        try:
            if int(request.headers.get("content-length", "0") or 0) > most + 2**16:
                raise ApiError(413, f"at most {most} bytes are accepted (--max-file-bytes)", closes=True)
            async with request.form(max_files=1, max_fields=4) as form:
                upload, purpose = form.get("file"), form.get("purpose")
                if not isinstance(upload, UploadFile) or purpose != "batch":
                    raise bad_request("expected the form's fields file, and purpose with the value batch")
                known, path = self._store.new_file(upload.filename or "file", "batch")
                size = await asyncio.to_thread(_copy, upload, path, most)
        except (MultiPartException, ValueError) as error:
            raise bad_request(f"expected multipart/form-data with file and purpose: {error}") from None
        except ClientDisconnect:
            raise ClientGone from None
        if size > most:
            self._store.delete(known["id"])
            raise ApiError(413, f"at most {most} bytes are accepted (--max-file-bytes)")
        return JSONResponse({**known, "bytes": size})

    async def files(self) -> Response:
        """All files."""
        return JSONResponse({"object": "list", "data": list(self._store.files()), "has_more": False})

    async def file(self, file_id: str) -> Response:
        """What is known of a file."""
        return JSONResponse(self._store.file(file_id))

    async def content(self, file_id: str) -> Response:
        """What is in a file."""
        path = self._store.content(file_id)
        path.touch()
        return FileResponse(path, media_type="application/jsonl")

    async def delete(self, file_id: str) -> Response:
        """Delete a file."""
        self._store.delete(file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    # ---- jobs ---------------------------------------------------------------------------------

    async def create(self, request: Request) -> Response:
        """Ask for a job."""
        limits = self._settings.limits
        body = await read_body(
            request,
            BatchRequest,
            max_bytes=limits.max_body_bytes,
            timeout_s=limits.receive_timeout,
            ignore_unknown=limits.unknown_fields == "ignore",
        )
        batch = self._store.new_batch(
            body.input_file_id, body.endpoint, body.completion_window, body.metadata or {}
        )
        self._queue.put_nowait(batch["id"])
        return JSONResponse(batch)

    async def batches(self, request: Request) -> Response:
        """Jobs, the newest first: ``limit`` of them, ``after`` one."""
        limit, after = request.query_params.get("limit", str(_LISTED)), request.query_params.get("after")
        if not limit.isdecimal() or not 1 <= int(limit) <= 100:
            raise bad_request("expected a number from 1 to 100", "limit")
        known = list(self._store.batches())
        if after is not None:
            ids = [batch["id"] for batch in known]
            if after not in ids:
                raise bad_request("there is no such batch", "after")
            known = known[ids.index(after) + 1 :]
        shown = known[: int(limit)]
        return JSONResponse({"object": "list", "data": shown, "has_more": len(known) > len(shown)})

    async def batch(self, batch_id: str) -> Response:
        """A job as it is now."""
        return JSONResponse(self._store.batch(batch_id))

    async def cancel(self, batch_id: str) -> Response:
        """End a job; what is answered stays."""
        batch = self._store.batch(batch_id)
        if batch["status"] not in ("validating", "in_progress"):
            raise bad_request(f"the batch is {batch['status']}; nothing is left to cancel")
        now = int(time.time())
        self._store.save({**batch, "status": "cancelled", "cancelling_at": now, "cancelled_at": now})
        if self._current is not None and self._current[0] == batch_id:
            self._current[1].cancel()
            await asyncio.wait({self._current[1]})
        return JSONResponse(self._store.batch(batch_id))

    # ---- work ---------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            batch_id = await self._queue.get()
            if self._store.batch(batch_id)["status"] == "cancelled":
                continue
            task = asyncio.create_task(self._run(batch_id))
            self._current = batch_id, task
            try:
                await asyncio.wait({task})
            finally:
                task.cancel()
            self._current = None

    async def _run(self, batch_id: str) -> None:
        batch = self._store.batch(batch_id)
        try:
            await self._answer(batch)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("batch %s failed", batch_id)
            told = str(error) if isinstance(error, OpsinError) else "internal error; see the server's log"
            fault = {"code": "failed", "message": told, "line": None, "param": None}
            batch.update(status="failed", failed_at=int(time.time()))
            batch["errors"] = {"object": "list", "data": [fault]}
            self._store.save(batch)

    async def _answer(self, batch: dict[str, Any]) -> None:
        serving = await self._loaded()
        source = Source(path=self._store.content(batch["input_file_id"]), kind=".jsonl")
        batch.update(status="in_progress", in_progress_at=batch["in_progress_at"] or int(time.time()))
        counts = batch["request_counts"]
        counts["total"] = await asyncio.to_thread(source.count)
        self._store.save(batch)
        answers, errors = (self._store.content(batch[name]) for name in ("output_file_id", "error_file_id"))
        # Half of the engine's places at most: those who wait for an answer go before a job.
        at_once = max(1, serving.info.config.max_num_seqs // 2)
        with Output(answers) as good, Output(errors) as bad:
            rows = (_meant(row, batch["endpoint"]) for row in left(source, good.done | bad.done))
            async with aclosing(lines(serving, rows, at_once=at_once)) as made:
                async for line in made:
                    (bad if line.failed else good).write(line.text, failed=line.failed)
                    counts.update(
                        completed=good.num_done + good.num_written, failed=bad.num_done + bad.num_written
                    )
                    if (good.num_written + bad.num_written) % _SAVED_EVERY == 0:
                        self._store.save(batch)
            counts.update(completed=good.num_done + good.num_written, failed=bad.num_done + bad.num_written)
        batch.update(status="completed", finalizing_at=int(time.time()), completed_at=int(time.time()))
        self._store.save(batch)

    async def _loaded(self) -> Serving:
        while True:
            try:
                return self._serving()
            except ApiError:
                await asyncio.sleep(0.2)


def _meant(row: Row, endpoint: str) -> Row:
    """A row, or its error: the job's endpoint is that of all rows."""
    if row.error or row.route == endpoint:
        return row
    return Row(custom_id=row.custom_id, error=f"url is {row.route}; the batch is for {endpoint}")


def _copy(upload: UploadFile, path: Path, most: int) -> int:
    """Write an upload to its place, with one byte more than is accepted at most; its size."""
    size = 0
    with path.open("wb") as file:
        while size <= most and (piece := upload.file.read(2**20)):
            file.write(piece)
            size += len(piece)
    return size
