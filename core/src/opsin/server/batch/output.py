"""What a job has come to: a line of JSON for each row, in OpenAI's form, written as soon as it is known.

The file is also the job's memory: what stands in it is not asked again.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from opsin.errors import ConfigError
from opsin.server.batch.rows import key_of
from opsin.server.http.errors import ApiError


def answer_line(custom_id: str, body: str) -> bytes:
    """The line of a row that was answered; ``body`` is the response's JSON."""
    return _line(custom_id, 200, body)


def error_line(custom_id: str, error: ApiError) -> bytes:
    """The line of a row that was refused, or failed."""
    return _line(custom_id, error.status, error.body().model_dump_json())


def _line(custom_id: str, status: int, body: str) -> bytes:
    name, request_id = json.dumps(custom_id, ensure_ascii=False), uuid.uuid4().hex
    response = f'{{"status_code": {status}, "request_id": "{request_id}", "body": {body}}}'
    return (
        f'{{"id": "batch_req_{request_id}", "custom_id": {name}, "response": {response}, "error": null}}\n'
    ).encode()


class Output:
    """The output of a job, which goes on where an earlier run of it ended.

    Attributes:
        done: `key_of` the rows that stand in it.
        num_done: rows that stood there when it was opened.
        num_failed: rows that were refused or failed, of all.
        num_written: rows of this run.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there. A last line that was cut off is dropped.

        Raises:
            ConfigError: the file is no output of a job, or cannot be written.
        """
        self.done: set[int] = set()
        self.num_failed = self.num_written = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            self._read(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        self.num_done = len(self.done)

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, line: bytes, *, failed: bool) -> None:
        """Add a row's line; it is the system's when this returns, so no end of this process loses it."""
        self._file.write(line)
        self._file.flush()
        self.num_written += 1
        self.num_failed += failed

    def _read(self, path: Path) -> None:
        end = 0
        for line in _lines(path):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            if not line.strip():
                continue
            try:
                given = json.loads(line)
                status = given["response"]["status_code"]
                self.done.add(key_of(given["custom_id"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path} holds something else than the output of a job (at byte {end - len(line)}); "
                    "name a new file"
                ) from error
            self.num_failed += status != 200
        self._file.truncate(end)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file
