"""Where the requests of a job come from: OpenAI's batch files, folders of pictures, CSV, parquet.

Every source is read as it is needed, never as a whole.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsin.errors import ConfigError

CHAT, EMBEDDINGS, COMPLETIONS = "/v1/chat/completions", "/v1/embeddings", "/v1/completions"

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Names of files that a folder's pictures end with."""

_ID_COLUMNS = ("custom_id", "id")
_PICTURE_COLUMNS = ("image", "image_url", "picture", "path", "url", "file", "bytes")
_PROMPT_COLUMNS = ("prompt", "question", "text")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One request of a job.

    Attributes:
        custom_id: its name in the output; where the source gives none, it says where the row stands.
        route: the path of the API that answers it.
        body: its request body as JSON; empty if there is an error.
        error: why the row cannot be asked.
    """

    custom_id: str
    route: str = CHAT
    body: bytes = b""
    error: str = ""


def key_of(custom_id: str) -> int:
    """A name as a number, the same in every process: a million of them are 64 MB less than as texts."""
    return int.from_bytes(
        hashlib.blake2b(custom_id.encode(errors="replace"), digest_size=8).digest(), "little"
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a job reads.

    Attributes:
        path: a .jsonl, .csv or .parquet file, or a folder of pictures.
        prompt: the question about each picture; None: each row has its own.
        system: system message before it.
        fields: what every request says besides, such as ``max_tokens``, for sources whose rows are no
            request bodies.
        kind: how the file is read, where its name does not say it: ".jsonl".
        embed: whether pictures become embeddings instead of answers.
    """

    path: Path
    prompt: str | None = None
    system: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    embed: bool = False
    kind: str | None = None

    def __post_init__(self) -> None:
        """Find out at once what cannot be read.

        Raises:
            ConfigError: there is no such file, it is of an unknown kind, or a folder comes without a prompt.
        """
        if not self.path.exists():
            raise ConfigError(f"{self.path} does not exist")
        kind = self._kind
        if kind not in _READERS:
            raise ConfigError(
                f"{self.path}: expected a folder of pictures, or a file that ends with "
                f"{', '.join(name for name in _READERS if name)}"
            )
        if kind == ".jsonl" and (self.prompt or self.system or self.fields):
            raise ConfigError(
                f"{self.path}: its lines are whole requests; --prompt and the like belong in them"
            )
        if kind == "" and self.prompt is None and not self.embed:
            raise ConfigError(
                f"{self.path} is a folder of pictures: pass --prompt with the question about each"
            )
        if kind == ".parquet":
            _parquet(self.path)

    @property
    def _kind(self) -> str:
        return self.kind or ("" if self.path.is_dir() else self.path.suffix.lower())

    def __iter__(self) -> Iterator[Row]:
        """The rows, in order. A name that was used before makes its row an error."""
        seen: set[int] = set()
        for number, row in enumerate(_READERS[self._kind](self), 1):
            key = key_of(row.custom_id)
            if key in seen:
                name = f"{row.custom_id:.80}"
                row = Row(custom_id=f"row-{number}", error=f"custom_id {name!r} was used before")
                key = key_of(row.custom_id)
            seen.add(key)
            yield row

    def count(self) -> int:
        """How many rows there are, or nearly: for the progress."""
        if self._kind == "":
            return sum(1 for _ in _pictures(self.path))
        if self._kind == ".parquet":
            rows: int = _parquet(self.path).metadata.num_rows
            return rows
        with self.path.open("rb") as file:
            lines = sum(1 for line in file if line.strip())
        return lines - (self._kind == ".csv")

    def chat(self, custom_id: str, picture: str | bytes | None, prompt: Any) -> Row:
        """A row about one picture.

        Args:
            custom_id: its name.
            picture: encoded bytes, a URL, or a file's name, which is relative to the source's folder.
            prompt: the question; None or empty: the job's.
        """
        text = self.prompt if prompt in (None, "") else str(prompt)
        content: list[dict[str, Any]] = []
        if picture not in (None, "", b""):
            content.append({"type": "image_url", "image_url": {"url": self._url(picture)}})
        if text:
            content.append({"type": "text", "text": text})
        if not content or (not text and not self.embed):
            return Row(custom_id=custom_id, error="the row has no prompt, and there is no --prompt")
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        body = {**self.fields, "messages": messages}
        return Row(
            custom_id=custom_id,
            route=EMBEDDINGS if self.embed else CHAT,
            body=json.dumps(body, ensure_ascii=False).encode(),
        )

    def _url(self, picture: str | bytes | None) -> str:
        if isinstance(picture, bytes):
            return f"data:image/*;base64,{base64.b64encode(picture).decode()}"
        assert picture is not None
        if picture.partition(":")[0].lower() in ("http", "https", "data", "file"):
            return picture
        folder = self.path if self.path.is_dir() else self.path.parent
        return (folder.resolve() / Path(picture).expanduser()).as_uri()


# ---- Kinds of sources ----------------------------------------------------------------------------


def _requests(source: Source) -> Iterator[Row]:
    """OpenAI's batch format: ``{"custom_id": ..., "method": "POST", "url": ..., "body": {...}}`` a line."""
    with source.path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _request(number, line)


def _request(number: int, line: bytes) -> Row:
    place = f"line-{number}"
    try:
        given = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one
        return Row(custom_id=place, error=f"line {number} is not JSON: {error}")
    if not isinstance(given, dict):
        return Row(custom_id=place, error=f"line {number} is no object")
    custom_id = given.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return Row(custom_id=place, error=f"line {number}: custom_id is {custom_id!r:.80}; expected a text")
    if given.get("method", "POST") != "POST":
        return Row(custom_id=custom_id, error=f"method is {given['method']!r:.80}; expected 'POST'")
    route = given.get("url")
    if route not in (CHAT, EMBEDDINGS, COMPLETIONS):
        known = ", ".join((CHAT, EMBEDDINGS, COMPLETIONS))
        return Row(custom_id=custom_id, error=f"url is {route!r:.80}; expected one of {known}")
    body = given.get("body")
    if not isinstance(body, dict):
        return Row(custom_id=custom_id, error=f"body is {body!r:.80}; expected an object")
    return Row(custom_id=custom_id, route=route, body=json.dumps(body, ensure_ascii=False).encode())


def _pictures(folder: Path) -> Iterator[Path]:
    yield from sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file()
    )


def _folder(source: Source) -> Iterator[Row]:
    for path in _pictures(source.path):
        name = path.relative_to(source.path).as_posix()
        yield source.chat(name, name, None)


def _csv(source: Source) -> Iterator[Row]:
    with source.path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        columns = _columns(source, reader.fieldnames or ())
        for number, record in enumerate(reader, 1):
            yield _record(source, number, columns, record)


def _parquet_rows(source: Source) -> Iterator[Row]:
    file = _parquet(source.path)
    columns = _columns(source, file.schema_arrow.names)
    number = 0
    for batch in file.iter_batches(batch_size=64, columns=[name for name in columns.values() if name]):
        for record in batch.to_pylist():
            number += 1
            yield _record(source, number, columns, record)


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError(f"{path}: parquet is read by pyarrow; pip install 'opsin[batch]'") from None
    try:
        return ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path} is not a readable parquet file: {error}") from error


def _columns(source: Source, names: Any) -> Mapping[str, str | None]:
    """Which column is what; ConfigError if none can be a picture or a prompt."""
    by_lower = {str(name).strip().lower(): name for name in names}
    found: dict[str, str | None] = {
        role: next((by_lower[name] for name in known if name in by_lower), None)
        for role, known in (("id", _ID_COLUMNS), ("picture", _PICTURE_COLUMNS), ("prompt", _PROMPT_COLUMNS))
    }
    if found["picture"] is None and found["prompt"] is None:
        raise ConfigError(
            f"{source.path} has the columns {', '.join(map(str, names)) or 'none'}; expected one of "
            f"{', '.join(_PICTURE_COLUMNS)} for pictures, or of {', '.join(_PROMPT_COLUMNS)} for questions"
        )
    return found


def _record(source: Source, number: int, columns: Mapping[str, str | None], record: Mapping[str, Any]) -> Row:
    value = {role: None if name is None else record.get(name) for role, name in columns.items()}
    custom_id = f"row-{number}" if value["id"] in (None, "") else str(value["id"])
    picture = value["picture"]
    if isinstance(picture, Mapping):  # as the datasets library stores pictures
        picture = picture.get("bytes") or picture.get("path")
    if not isinstance(picture, (str, bytes, type(None))):
        kind = type(picture).__name__
        return Row(
            custom_id=custom_id, error=f"the picture is a value of type {kind}; expected bytes or a text"
        )
    return source.chat(custom_id, picture, value["prompt"])


_READERS = {".jsonl": _requests, "": _folder, ".csv": _csv, ".parquet": _parquet_rows}
