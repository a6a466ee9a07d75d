"""`opsin batch`: every row once, whatever happens in between; a row's fault is the row's."""

from __future__ import annotations

import base64
import csv
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opsin import LLM, SamplingParams
from opsin.cli import main
from opsin.errors import ConfigError
from opsin.server.batch.output import Output
from opsin.server.batch.rows import Row, Source
from tests.models.golden import GOLDEN

MODEL = str(GOLDEN / "qwen2vl" / "model")
FLAGS = ("--dtype", "float32", "--kv-cache-memory", str(2**23))
QUESTION = "What colour is it?"


def colours(count: int) -> list[tuple[int, int, int]]:
    return [(37 * i % 256, 91 * i % 256, 53 * i % 256) for i in range(count)]


def picture(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (56, 56), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "inner").mkdir()
    for number, colour in enumerate(colours(12)):
        (folder / ("inner" if number % 3 else ".") / f"{number:02} ü.png").write_bytes(picture(colour))
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """The answer about each of the pictures, from the library."""
    with LLM(MODEL, dtype="float32", kv_cache_memory=2**23) as llm:
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": picture(c)}, {"type": "text", "text": QUESTION}],
                }
            ]
            for c in colours(12)
        ]
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


Run = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the command; returns its exit status and the lines of its output."""

    def run(source: Path, *flags: str, out: Path | None = None) -> tuple[int, list[dict[str, Any]]]:
        out = out or tmp_path / "out.jsonl"
        with pytest.raises(SystemExit) as ended:
            main(["batch", MODEL, str(source), str(out), *FLAGS, *flags])
        return int(ended.value.code or 0), lines_of(out)

    return run


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def texts(lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in lines
        if line["response"]["status_code"] == 200
    }


ASKED = ("--prompt", QUESTION, "--max-tokens", "6", "--temperature", "0")


def test_a_folder_of_pictures(run: Run, folder: Path, expected: list[str]) -> None:
    status, lines = run(folder, *ASKED)
    assert status == 0
    names = {
        ("inner/" if number % 3 else "") + f"{number:02} ü.png": text for number, text in enumerate(expected)
    }
    assert texts(lines) == names


def request(custom_id: str, colour: tuple[int, int, int], **changes: Any) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(picture(colour)).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 6,
        "temperature": 0,
    }
    row = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return {**row, **changes}


def test_openais_files_with_bad_rows(run: Run, tmp_path: Path, expected: list[str]) -> None:
    good = [request(f"r{number}", colour) for number, colour in enumerate(colours(12))]
    bad = [
        "no json",
        "[1]",
        json.dumps(request("", (0, 0, 0))),
        json.dumps(request("r3", (0, 0, 0))),  # a second time
        json.dumps(request("no-url", (0, 0, 0), url="/v1/images")),
        json.dumps(request("no-body", (0, 0, 0), body=None)),
        json.dumps(request("get", (0, 0, 0), method="GET")),
        json.dumps(request("unknown", (0, 0, 0), body={"messages": [], "temprature": 1})),
        json.dumps(request("streamed", (0, 0, 0), body={**good[0]["body"], "stream": True})),
        json.dumps(
            request(
                "broken",
                (0, 0, 0),
                body={
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
                            ],
                        }
                    ]
                },
            )
        ),
        json.dumps(request("embeds", (0, 0, 0), url="/v1/embeddings", body={"input": "x"})),
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join([*map(json.dumps, good[:6]), *bad, "", *map(json.dumps, good[6:])]) + "\n")
    status, lines = run(source)
    assert status == 3
    assert texts(lines) == {f"r{number}": text for number, text in enumerate(expected)}
    errors = {line["custom_id"]: line["response"] for line in lines if line["response"]["status_code"] != 200}
    assert len(lines) == len(good) + len(bad)
    assert set(errors) == {
        *("line-7", "line-8", "line-9", "row-10", "no-url", "no-body", "get", "unknown", "streamed"),
        *("broken", "embeds"),
    }
    told = {name: response["body"]["error"]["message"] for name, response in errors.items()}
    assert "line 7 is not JSON" in told["line-7"]
    assert "'r3' was used before" in told["row-10"]
    assert "url is '/v1/images'" in told["no-url"]
    assert "did you mean 'temperature'" in told["unknown"]
    assert "leave stream out" in told["streamed"]
    assert all(response["status_code"] == 400 for response in errors.values())


def test_tables(run: Run, tmp_path: Path, folder: Path, expected: list[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = {path.name[:2]: path for path in folder.rglob("*.png")}
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Custom_ID", "image", "prompt", "more"])
        for number in range(12):
            path = names[f"{number:02}"]
            (tmp_path / f"near{number}.png").write_bytes(path.read_bytes())
            writer.writerow(
                [f"r{number}", f"near{number}.png" if number % 2 else path, "" if number else QUESTION, 1]
            )
    status, lines = run(table, *ASKED)
    assert status == 0
    assert texts(lines) == {f"r{number}": text for number, text in enumerate(expected)}
    for kind, values in {
        "bytes": [picture(colour) for colour in colours(12)],
        "as datasets stores them": [{"bytes": picture(colour), "path": None} for colour in colours(12)],
        "paths": [str(names[f"{number:02}"]) for number in range(12)],
    }.items():
        file = tmp_path / f"{kind}.parquet"
        parquet.write_table(pyarrow.table({"image": values, "question": [QUESTION] * 12}), file)
        status, lines = run(file, *ASKED, "--keep-order", out=tmp_path / f"{kind}.jsonl")
        assert status == 0
        assert [line["custom_id"] for line in lines] == [f"row-{number}" for number in range(1, 13)]
        assert list(texts(lines).values()) == expected


def test_pictures_that_are_not_there_are_errors_of_their_rows(run: Run, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("path\nabsent.png\nfile:///etc/passwd\nhttp://127.0.0.1:9/x.png\n")
    status, lines = run(table, *ASKED)
    assert status == 3
    told = {line["custom_id"]: line["response"]["status_code"] for line in lines}
    assert told == {"row-1": 400, "row-2": 400, "row-3": 403}


def test_killed_in_the_middle_it_goes_on_where_it_was(tmp_path: Path, expected: list[str]) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [request(f"r{number}", colours(12)[number % 12]) for number in range(240)]
    source.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "opsin", "batch", MODEL, str(source), str(out), *FLAGS]
    small = ("--max-num-seqs", "4", "--keep-order")
    process = subprocess.Popen([*command, *small], stderr=subprocess.DEVNULL)
    while len(lines_of_growing(out)) < 60:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with out.open("ab") as file:  # a line that was cut off
        file.write(b'{"id": "batch_req_1", "custom_id": "r239", "resp')
    before = len(lines_of_growing(out))
    assert 60 <= before < 240
    done = subprocess.run([*command, *small, "--json"], capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts == {"answered": 240, "failed": 0, "before": before}
    lines = lines_of(out)
    assert [line["custom_id"] for line in lines] == [f"r{number}" for number in range(240)]
    assert list(texts(lines).values()) == expected * 20


def lines_of_growing(out: Path) -> list[bytes]:
    return (
        [line for line in out.read_bytes().splitlines(True) if line.endswith(b"\n")] if out.exists() else []
    )


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [request(f"r{number}", colours(12)[number % 12]) for number in range(2000)]
    source.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "opsin", "batch", MODEL, str(source), str(out), *FLAGS]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(lines_of_growing(out)) < 20:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"what is done is in {out}" in told
    assert "Traceback" not in told
    names = [line["custom_id"] for line in lines_of(out)]
    assert len(names) == len(set(names)) >= 20


def test_a_job_that_is_done_loads_no_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(request("r", (1, 2, 3))))
    assert run(source)[0] == 0
    monkeypatch.setattr("opsin.server.batch.job.AsyncEngine.from_config", lambda _: pytest.fail("loaded"))
    assert run(source)[0] == 0


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("absent.jsonl", None, {}, "does not exist"),
        ("in.txt", "x", {}, "expected a folder of pictures, or a file that ends with .jsonl, .csv, .parquet"),
        ("in.jsonl", "{}", {"prompt": "x"}, "its lines are whole requests"),
        ("in.parquet", "PAR1", {}, "not a readable parquet file"),
        ("", None, {}, "pass --prompt"),
    ],
)
def test_sources_that_cannot_be_read(
    tmp_path: Path, name: str, content: str | None, options: dict[str, Any], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        Source(path=tmp_path / name, **options)


def test_a_table_without_known_columns(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("colour,size\nred,3\n")
    with pytest.raises(ConfigError, match="has the columns colour, size; expected one of image"):
        list(Source(path=tmp_path / "in.csv"))


def test_rows_without_a_question_are_errors(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("image,prompt\na.png,\n,What?\n")
    first, second = Source(path=tmp_path / "in.csv")
    assert "no prompt" in first.error
    assert json.loads(second.body)["messages"][0]["content"] == [{"type": "text", "text": "What?"}]


def test_an_output_that_is_something_else_is_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "important.jsonl"
    out.write_text('{"mine": 1}\n')
    with pytest.raises(ConfigError, match="something else than the output of a job"):
        Output(out)
    assert out.read_text() == '{"mine": 1}\n'


def test_the_source_is_read_as_it_is_needed(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    with source.open("w") as file:
        for number in range(100_000):
            file.write(
                json.dumps({"custom_id": f"r{number}", "url": "/v1/chat/completions", "body": {}}) + "\n"
            )
    rows = iter(Source(path=source))
    assert next(rows) == Row(custom_id="r0", body=b"{}")
    assert Source(path=source).count() == 100_000
