"""OpenAI's files and batches, with its client."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from tests.models.golden import GOLDEN
from tests.server.process import ServerProcess, serve

MODEL = str(GOLDEN / "qwen2vl" / "model")
FLAGS = ("--dtype", "float32", "--kv-cache-memory", str(2**23), "--max-num-seqs", "8")
CHAT = "/v1/chat/completions"


def row(custom_id: str, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Say {custom_id}"}]
    body: dict[str, Any] = {"messages": messages, "max_tokens": 6, "temperature": 0}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": CHAT,
        "body": {**body, "ignore_eos": True},
        **changes,
    }


def upload(client: openai.OpenAI, rows: list[Any]) -> str:
    lines = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in rows)
    return client.files.create(file=io.BytesIO(lines.encode()), purpose="batch").id


def finished(client: openai.OpenAI, batch_id: str) -> Any:
    while (batch := client.batches.retrieve(batch_id)).status in ("validating", "in_progress"):
        time.sleep(0.05)
    return batch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def process(tmp_path: Path, folder: Path) -> Iterator[ServerProcess]:
    with serve(MODEL, *FLAGS, "--files-dir", str(folder), log=tmp_path / "log") as running:
        yield running


@pytest.fixture
def client(process: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0)


def test_a_batch_from_upload_to_content(client: openai.OpenAI) -> None:
    rows = [row(f"r{number}") for number in range(30)]
    wrong = [
        row("stranger", url="/v1/completions"),
        row("typo", body={"messages": [], "modle": 1}),
        "no json",
    ]
    file_id = upload(client, [*rows[:15], *wrong, *rows[15:]])
    assert client.files.retrieve(file_id).purpose == "batch"
    assert [known.id for known in client.files.list()] == [file_id]
    batch = client.batches.create(
        input_file_id=file_id, endpoint=CHAT, completion_window="24h", metadata={"for": "a test"}
    )
    done = finished(client, batch.id)
    assert done.status == "completed"
    assert done.metadata == {"for": "a test"}
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (33, 30, 3)
    lines = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert {line["custom_id"] for line in lines} == {f"r{number}" for number in range(30)}
    assert all(line["response"]["body"]["usage"]["completion_tokens"] == 6 for line in lines)
    errors = [json.loads(line) for line in client.files.content(done.error_file_id).text.splitlines()]
    told = {line["custom_id"]: line["response"]["body"]["error"]["message"] for line in errors}
    assert set(told) == {"stranger", "typo", "line-18"}
    assert "the batch is for /v1/chat/completions" in told["stranger"]
    assert [known.id for known in client.batches.list()] == [batch.id]
    client.files.delete(file_id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file_id)


def test_a_batch_goes_on_with_the_next_server(tmp_path: Path, folder: Path) -> None:
    flags = (*FLAGS, "--files-dir", str(folder))
    with serve(MODEL, *flags, log=tmp_path / "first") as first:
        client = openai.OpenAI(base_url=f"{first.url}/v1", api_key="none", max_retries=0)
        rows = [row(f"r{number}", body={**row("x")["body"], "max_tokens": 60}) for number in range(120)]
        batch = client.batches.create(
            input_file_id=upload(client, rows), endpoint=CHAT, completion_window="24h"
        )
        while client.batches.retrieve(batch.id).request_counts.completed < 20:
            time.sleep(0.02)
    with serve(MODEL, *flags, log=tmp_path / "second") as second:
        client = openai.OpenAI(base_url=f"{second.url}/v1", api_key="none", max_retries=0)
        done = finished(client, batch.id)
        assert done.request_counts.completed == 120
        lines = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
        assert sorted(line["custom_id"] for line in lines) == sorted(f"r{number}" for number in range(120))


def test_a_batch_can_be_cancelled_and_leaves_room_for_others(client: openai.OpenAI) -> None:
    rows = [row(f"r{number}", body={**row("x")["body"], "max_tokens": 200}) for number in range(200)]
    batch = client.batches.create(input_file_id=upload(client, rows), endpoint=CHAT, completion_window="24h")
    while client.batches.retrieve(batch.id).status != "in_progress":
        time.sleep(0.02)
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=2
    )
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert client.batches.retrieve(batch.id).status == "in_progress", "who waits for an answer goes first"
    assert client.batches.cancel(batch.id).status == "cancelled"
    assert client.batches.retrieve(batch.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="nothing is left to cancel"):
        client.batches.cancel(batch.id)


def test_what_cannot_be(process: ServerProcess, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="is no id of a file or batch"):
        client.files.retrieve("..%2f..%2fetc")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch-" + "0" * 32)
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file-" + "0" * 32, endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="purpose with the value batch"):
        client.files.create(file=io.BytesIO(b"x"), purpose="assistants")
    for body in (b"", b"--x\r\n", b"x" * 1000):
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        assert requests.post(f"{process.url}/v1/files", body, headers=form, timeout=30).status_code == 400
    assert requests.post(f"{process.url}/v1/files", json={}, timeout=30).status_code == 400


def test_files_have_a_limit(tmp_path: Path, folder: Path) -> None:
    flags = (*FLAGS, "--files-dir", str(folder), "--max-file-bytes", "1000")
    with serve(MODEL, *flags, log=tmp_path / "log") as server:
        for size in (1001, 200_000):
            sent = requests.post(
                f"{server.url}/v1/files", files={"file": b"x" * size}, data={"purpose": "batch"}, timeout=30
            )
            assert sent.status_code == 413
            assert "--max-file-bytes" in sent.json()["error"]["message"]
        assert requests.get(f"{server.url}/v1/files", timeout=30).json()["data"] == []


def test_they_are_off_by_default(tmp_path: Path) -> None:
    with serve(MODEL, *FLAGS, log=tmp_path / "log") as server:
        assert requests.get(f"{server.url}/v1/files", timeout=30).status_code == 404
        assert requests.post(f"{server.url}/v1/batches", json={}, timeout=30).status_code == 404
