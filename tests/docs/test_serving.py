"""docs/serving.md: its tables name what there is, all of it, and nothing else."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image
from pydantic import BaseModel
from starlette.routing import Route

from opsin.cli import app
from opsin.server.app import App
from opsin.server.engine_host import EngineHost
from opsin.server.http.middleware import OPEN_PATHS
from opsin.server.schema.chat import ChatRequest, Part
from opsin.server.schema.prompts import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from opsin.server.settings import ServerSettings
from opsin.server.ui import UI_PATHS
from tests.server.in_thread import MODEL, golden_config, running
from tests.server.messages import CAT, data_url, image, text, user
from tests.server.process import serve

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()
README = (ROOT / "README.md").read_text()


def section(heading: str) -> str:
    """What stands under a heading, up to the next of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    _, found, rest = f"\n{PAGE}".partition(f"\n{heading}\n")
    assert found, heading
    return re.split(rf"\n#{{1,{level}}} ", rest)[0]


def rows(part: str, head: str) -> list[list[str]]:
    """The cells of the first table whose first column has that head."""
    _, found, rest = part.partition(f"\n| {head} |")
    assert found, head
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def named(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def test_endpoints() -> None:
    api = App(EngineHost(golden_config()), ServerSettings()).api
    there = {
        f"{method} {route.path}"
        for route in api.routes
        if isinstance(route, Route)
        for method in (route.methods or ()) - {"HEAD"}
    }
    table = rows(section("## Endpoints"), "endpoint")
    assert sorted(name for cells in table for name in named(cells[0])) == sorted(there)
    without_key = {name.split()[1] for cells in table for name in named(cells[0]) if cells[1] == "no"}
    assert without_key == OPEN_PATHS | UI_PATHS


def topics() -> dict[str, list[Any]]:
    """Topic of ``opsin serve --help`` -> its flags."""
    found: dict[str, list[Any]] = {}
    for argument in app["serve"].assemble_argument_collection():
        if argument.parameter.group[0].name not in ("Arguments", "Options"):
            found.setdefault(argument.parameter.group[0].name, []).append(argument)
    return found


def shown(default: Any) -> str:
    """A default as the table writes it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{default}`" if isinstance(default, str) and default else str(default or "")


def described(flag: Any) -> str:
    """Help and choices, as the table writes them."""
    choices = ", ".join(f"`{choice}`" for choice in flag.get_choices() or ())
    return f"{flag.parameter.help} {choices}".strip()


def test_flags() -> None:
    flags = section("## Flags")
    assert re.findall(r"^### (.*)$", flags, re.M) == list(topics())
    for topic, arguments in topics().items():
        table = rows(section(f"### {topic}"), "flag")
        listed = [flag for cells in table for flag in named(cells[0])]
        assert sorted(listed) == sorted(name for argument in arguments for name in argument.names)
        told = {name: [shown(a.field_info.default), described(a)] for a in arguments for name in a.names}
        for cells in table:
            assert all(cells[1:] == told[flag] for flag in named(cells[0])), cells[0]


def test_flags_named_elsewhere_exist() -> None:
    """On this page and in the README."""
    known = {name for arguments in topics().values() for argument in arguments for name in argument.names}
    page = re.sub(r"pip install .*|docker build .* docker run (?=--rm)--rm", "", PAGE)  # flags of others
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page + "".join(re.findall("opsin serve.*", README))))
    assert used - known <= {"--config", "--debug", "--help", "--ray", "--replicas"}


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("## Chat completions", ChatRequest),
        ("## Completions", CompletionRequest),
        ("## Embeddings", EmbeddingRequest),
        ("## Tokens", TokenizeRequest),
    ],
)
def test_fields(heading: str, model: type[BaseModel]) -> None:
    table = rows(section(heading), "field")
    listed = [name for cells in table for name in named(cells[0])]
    assert sorted(listed) == sorted(model.model_fields)


def test_fields_of_detokenize() -> None:
    table = rows(section("## Tokens").split("`POST /detokenize`:")[1], "field")
    assert [name for cells in table for name in named(cells[0])] == list(DetokenizeRequest.model_fields)


def test_parts_of_messages() -> None:
    table = rows(section("## Chat completions"), "part")
    listed = re.findall(r'"type": "(\w+)"', " ".join(cells[0] for cells in table))
    union, *_ = get_args(Part)
    there = [tag for part in get_args(union) for tag in get_args(part.model_fields["type"].annotation)]
    assert sorted([*listed, "input_text"]) == sorted(there)
    assert "`input_text`" in table[0][1]


def test_metrics() -> None:
    table = rows(section("## Metrics"), "name")
    listed = {name: cells[1] for cells in table for name in named(cells[0])}
    late = {name for cells in table if "†" in cells[0] for name in named(cells[0])}
    with running(golden_config(), wait=False) as server:
        server.get("/health")
        early = families(server.get("/metrics").text)
        server.app.host.wait()
        body = {"messages": user(image(data_url(CAT)), text("?")), "max_tokens": 2}
        assert server.post("/v1/chat/completions", body).status_code == 200
        found = families(server.get("/metrics").text)
    assert found == listed
    assert set(found) - set(early) <= late | {"opsin:request_success_total"}


def families(exposition: str) -> dict[str, str]:
    """Name -> type, as Prometheus' text format has them."""
    found = dict(re.findall(r"^# TYPE (\S+) (\S+)$", exposition, re.M))
    return {name: kind for name, kind in found.items() if not name.endswith("_created")}


def test_statuses_of_errors() -> None:
    """The table has every status that the server gives a name to."""
    from opsin.server.http.errors import _TYPES

    listed = {int(cells[0]) for cells in rows(section("## Errors"), "status")}
    assert listed == set(_TYPES)


def test_the_adapter_for_other_servers_works() -> None:
    """The code of the page, as it stands there."""
    [code] = re.findall(r"```python\n(.*?)```", section("## Deployment"), re.S)
    namespace: dict[str, Any] = {}
    exec(compile(code, "serving.md", "exec"), namespace)

    async def use() -> None:
        replica = namespace["Replica"](MODEL, dtype="float32", kv_cache_memory=2**22)
        body = {"messages": user(image(data_url(CAT)), text("?")), "max_tokens": 8, "temperature": 0}
        answer = await replica.chat(body)
        chunks = [chunk async for chunk in replica.stream({**body, "stream": True})]
        deltas = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
        assert "".join(deltas) == answer["choices"][0]["message"]["content"] != ""
        await replica.close()

    asyncio.run(use())


def test_the_client_of_the_readme_gets_a_true_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Server and client as they stand there, but for the port."""
    [part] = re.findall(r"^## Serve\n(.*?)^## ", README, re.M | re.S)
    [code] = re.findall(r"```python\n(.*?)```", part, re.S)
    [model] = re.findall(r"^opsin serve (\S+)", part, re.M)
    lines = [line for line in code.splitlines() if line]
    assert len(lines) + 1 <= 10, "server and client in ten lines"
    picture = Image.new("RGB", (112, 112), "white")
    picture.paste("red", (30, 30, 80, 80))
    picture.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    with serve(model, log=tmp_path / "log") as server:
        exec(compile(code.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), {})
    assert capsys.readouterr().out == "red\n"
