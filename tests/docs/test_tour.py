"""The tour: each package is named once, what it names exists, and its answers are where it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core/src/opsin"
TOUR = (ROOT / "docs/tour.md").read_text()
[TREE] = re.findall(r"```\nopsin/\n(.*?)```", TOUR, re.S)


def in_tree() -> list[str]:
    """Paths of the tree, each relative to the core; a line that only goes on names none."""
    found: list[str] = []
    folders: list[str] = []
    for line in TREE.splitlines():
        depth, name = len(line) - len(line.lstrip()), line.strip()
        if depth > 4 or not re.match(r"[\w./]+(, |  +|$)", name):
            continue
        folders = folders[: depth // 2 - 1]
        for entry in re.split(r"  +", name)[0].split(", "):
            found.append("".join(folders) + entry)
            if entry.endswith("/"):
                folders = [*folders, entry]
    return found


def test_each_package_and_each_module_at_the_top_is_named_once() -> None:
    packages = {f"{init.parent.relative_to(CORE)}/" for init in CORE.rglob("__init__.py")} - {"./"}
    modules = {file.name for file in CORE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert sorted(in_tree()) == sorted(packages | modules)


def test_the_files_it_names_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)`", TOUR)
    assert len(named) > 40
    assert [name for name in named if not (CORE / name).exists() and not (ROOT / name).exists()] == []


def test_no_folder_is_crowded() -> None:
    crowded = {
        str(folder): count
        for folder in {file.parent for file in CORE.rglob("*.py")}
        if (count := len(list(folder.glob("*.py")))) > 14
    }
    assert not crowded


def answer(question: str) -> str:
    [found] = re.findall(rf"^\| {re.escape(question)} \| (.*) \|$", TOUR, re.M)
    return str(found)


def users_of(name: str) -> list[str]:
    """Modules of the core that call ``name``, such as ``Image.open``."""
    return sorted(
        str(file.relative_to(CORE))
        for file in CORE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name
    )


def test_a_picture_is_decoded_where_the_tour_says() -> None:
    assert answer("Where is a picture decoded?") == "`inputs/media_files.py`"
    users = [user for user in users_of("Image.open") if not user.startswith("testing/")]
    assert users == ["inputs/media_files.py"]


def test_kv_blocks_are_freed_where_the_tour_says() -> None:
    from opsin.engine.cache import BlockPool

    assert answer("Where are KV blocks freed?") == "`engine/cache.py`: `BlockPool.release`"
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.release(blocks)
    assert pool.num_free == 2


@pytest.mark.parametrize(("what", "status"), [("asked", 400), ("broke", 500)])
def test_an_http_error_gets_its_status_where_the_tour_says(what: str, status: int) -> None:
    from opsin.errors import RequestError
    from opsin.server.http.errors import api_error

    assert answer("Where does an HTTP error get its status?") == "`server/http/errors.py`: `api_error`"
    error: Exception = RequestError("no") if what == "asked" else ZeroDivisionError("no")
    assert api_error(error, "id").status == status


def test_a_default_lives_where_the_tour_says() -> None:
    from opsin.config import EngineConfig

    said = answer("Where does a default live?")
    assert said == "`config.py`: `EngineConfig`; of the server: `server/settings.py`"
    default = EngineConfig.__dataclass_fields__["max_num_batched_tokens"].default
    written = [file for file in CORE.rglob("*.py") if f" = {default}\n" in file.read_text()]
    assert [file.relative_to(CORE).name for file in written] == ["config.py"]
