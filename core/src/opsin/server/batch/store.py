"""Files and jobs of OpenAI's batch API, as files under one folder: they outlast the server."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opsin.errors import ConfigError
from opsin.server.http.errors import ApiError, bad_request

_ID = re.compile(r"(?:file|batch)-[0-9a-f]{32}")
_ENDED = frozenset({"completed", "failed", "cancelled"})


class Store:
    """What clients have uploaded, the jobs they have asked for, and what these came to."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if the folder cannot be used."""
        self._files, self._batches = folder / "files", folder / "batches"
        try:
            for part in (self._files, self._batches):
                part.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"--files-dir {folder}: {error.strerror}") from error

    # ---- files --------------------------------------------------------------------------------

    def new_file(self, name: str, purpose: str) -> tuple[dict[str, Any], Path]:
        """A file that is empty yet: what is known of it, and where its content goes."""
        file_id = _new_id("file")
        folder = self._files / file_id
        folder.mkdir(mode=0o700)
        known = {
            "id": file_id,
            "object": "file",
            "bytes": 0,
            "created_at": int(time.time()),
            "filename": name[:200],
            "purpose": purpose,
            "status": "processed",
        }
        _write(folder / "about.json", known)
        return known, folder / "content"

    def file(self, file_id: str) -> dict[str, Any]:
        """What is known of a file.

        Raises:
            ApiError: 404: there is none with this id.
        """
        folder = self._files / _checked(file_id)
        try:
            about: dict[str, Any] = json.loads((folder / "about.json").read_text())
        except OSError:
            raise ApiError(404, f"there is no file {file_id!r:.80}") from None
        content = folder / "content"
        return {**about, "bytes": content.stat().st_size if content.exists() else 0}

    def content(self, file_id: str) -> Path:
        """Where a file's content is; see `file`."""
        self.file(file_id)
        return self._files / file_id / "content"

    def files(self) -> Iterator[dict[str, Any]]:
        """All files, the newest first."""
        known = [self.file(path.name) for path in self._files.iterdir() if (path / "about.json").exists()]
        yield from sorted(known, key=lambda about: -about["created_at"])

    def delete(self, file_id: str) -> None:
        """Delete a file; see `file`."""
        self.file(file_id)
        shutil.rmtree(self._files / file_id)

    # ---- jobs ---------------------------------------------------------------------------------

    def new_batch(
        self, file_id: str, endpoint: str, window: str, metadata: Mapping[str, str]
    ) -> dict[str, Any]:
        """A job for a file's rows.

        Raises:
            ApiError: there is no such file, or it is for something else.
        """
        if self.file(file_id)["purpose"] != "batch":
            raise bad_request("the file's purpose is not 'batch'", "input_file_id")
        now = int(time.time())
        batch = {
            "id": _new_id("batch"),
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": file_id,
            "completion_window": window,
            "status": "validating",
            "output_file_id": self.new_file("output.jsonl", "batch_output")[0]["id"],
            "error_file_id": self.new_file("errors.jsonl", "batch_output")[0]["id"],
            "created_at": now,
            "in_progress_at": None,
            "expires_at": None,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": dict(metadata),
        }
        self.save(batch)
        return batch

    def save(self, batch: Mapping[str, Any]) -> None:
        """Keep a job as it is now."""
        _write(self._batches / f"{batch['id']}.json", batch)

    def batch(self, batch_id: str) -> dict[str, Any]:
        """A job.

        Raises:
            ApiError: 404: there is none with this id.
        """
        try:
            found: dict[str, Any] = json.loads((self._batches / f"{_checked(batch_id)}.json").read_text())
        except OSError:
            raise ApiError(404, f"there is no batch {batch_id!r:.80}") from None
        return found

    def batches(self) -> Iterator[dict[str, Any]]:
        """All jobs, the newest first."""
        known = [json.loads(path.read_text()) for path in self._batches.glob("batch-*.json")]
        yield from sorted(known, key=lambda batch: (-batch["created_at"], batch["id"]))

    def unfinished(self) -> list[dict[str, Any]]:
        """Jobs that an earlier server has begun, or was to begin; the oldest first."""
        return [batch for batch in self.batches() if batch["status"] not in _ENDED][::-1]


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def _checked(given: str) -> str:
    if not _ID.fullmatch(given):
        raise ApiError(404, f"{given!r:.80} is no id of a file or batch")
    return given


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(value))
    os.replace(beside, path)
