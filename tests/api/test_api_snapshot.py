"""The public API against its records: nothing goes, and what comes is announced."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from opsin import EngineConfig
from tools import api_snapshot
from tools.api_snapshot import RECORDS, ROOT, SOURCE, api_version, changes, public_api, read, unlisted

VERSIONS = sorted((file.stem for file in RECORDS.glob("*.txt")), key=lambda v: [int(n) for n in v.split(".")])
CURRENT = public_api(SOURCE)


SAME_EFFECT = {"opsin.EngineConfig(task=)"}
"""Written differently, and the same for who uses it; each has a test below."""


def test_the_default_task_is_still_to_answer() -> None:
    assert EngineConfig(model="m").task == "generate"


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_public_was_removed_or_changed(version: str) -> None:
    breaking = [change for change in changes(read(version), CURRENT) if change.breaks]
    broken = [str(change) for change in breaking if change.name not in SAME_EFFECT]
    assert not broken, f"code written for API {version} would break"


def test_the_record_is_of_this_code() -> None:
    version = api_version(SOURCE)
    assert version in VERSIONS, f"no record of API {version}; run python tools/api_snapshot.py"
    found = [str(change) for change in changes(read(version), CURRENT)]
    assert not found, (
        f"API {version} is released: raise API_MINOR in opsin/api/specs.py"
        if api_snapshot.released(version)
        else "run python tools/api_snapshot.py"
    )
    assert read(version) == CURRENT


@pytest.mark.parametrize(("older", "newer"), list(itertools.pairwise(VERSIONS)))
def test_additions_are_listed_in_the_docs(older: str, newer: str) -> None:
    missing = [str(change) for change in unlisted(changes(read(older), read(newer)), newer)]
    assert not missing, f"docs/api-changes.md does not list them under {newer}"


def test_the_record_holds_what_plugins_are_written_with() -> None:
    record = "\n".join(read("1.0"))
    for part in (
        "dataclass opsin.api.Expansion(*, token_ids: Sequence[int], is_embed: Sequence[bool])",
        "def opsin.api.Model.forward(step: ForwardStep) -> Tensor",
        "def opsin.hookspecs.opsin_register_kernels() -> Sequence[KernelSpec]",
        "class opsin.layers.Decoder(context: BuildContext, config: DecoderConfig, *, rotary: nn.Module, ",
        "opsin.layers.Decoder.embed_tokens",
        "opsin.api.Activation = Literal['silu', 'gelu', 'gelu_tanh', 'quick_gelu']",
        "def opsin.testing.kernels.check_kernel(",
        "class opsin.LLM(model: str",
    ):
        assert part in record


def test_a_released_record_is_not_written_again(tmp_path: Path) -> None:
    package = tmp_path / "opsin"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "api.py").write_text("API_MAJOR = 1\nAPI_MINOR = 0\n")
    command = [sys.executable, "tools/api_snapshot.py", "--source", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 1
    assert "API 1.0 is released and its record final; raise API_MINOR" in result.stderr


# --------------------------------------------------------------------------------------------------
# The comparison, on small packages
# --------------------------------------------------------------------------------------------------

BEFORE = """
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pkg.inner import Base

Kind = Literal["a", "b"]
LIMIT = 3
_private = 1

@dataclass(frozen=True, kw_only=True)
class Spec:
    name: str
    tags: Sequence[str] = ()
    extra: dict[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str: ...

class Op(Protocol):
    def __call__(self, x: int, *, keep: bool) -> int: ...

class Layer(Base):
    def __init__(self, size: int) -> None:
        self.weight = size
        self._hidden = size

def run(x: int, y: int = 0, *, scale: float = 1.0) -> int: ...
def configure(*, device: str = "cpu", **settings: Any) -> None: ...
async def wait() -> None: ...
"""

INNER = """
class Base:
    def slots(self) -> int: ...
"""


def record(folder: Path, source: str, inner: str = INNER) -> list[str]:
    package = folder / "pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    (package / "inner.py").write_text(inner)
    return public_api(folder, ["pkg"])


def test_a_record_has_one_line_for_each_name(tmp_path: Path) -> None:
    assert [line for line in record(tmp_path, BEFORE) if "inner" not in line] == [
        "pkg.Kind = Literal['a', 'b']",
        "pkg.LIMIT = 3",
        "class pkg.Layer(size: int)",
        "def pkg.Layer.slots() -> int",
        "pkg.Layer.weight",
        "class pkg.Op",
        "def pkg.Op.__call__(x: int, *, keep: bool) -> int",
        "dataclass pkg.Spec(*, name: str, tags: Sequence[str] = (), extra: dict[str, int] = dict())",
        "pkg.Spec.title: str",
        "def pkg.configure(*, device: str = 'cpu', **settings: Any) -> None",
        "def pkg.run(x: int, y: int = 0, *, scale: float = 1.0) -> int",
        "async def pkg.wait() -> None",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("LIMIT = 3", "", "pkg.LIMIT: was removed"),
        ("LIMIT = 3", "LIMIT = 4", "pkg.LIMIT: was = 3, is = 4"),
        ('["a", "b"]', '["a"]', "pkg.Kind(b): was removed"),
        ("class Layer(Base)", "class Layer", "pkg.Layer.slots: was removed"),
        ("self.weight = size", "pass", "pkg.Layer.weight: was removed"),
        ("@property", "", "pkg.Spec.title: was a value, is a def"),
        ("    tags: Sequence[str] = ()\n", "", "pkg.Spec(tags=): was removed"),
        ("tags: Sequence[str] = ()", "tags: Sequence[str]", "pkg.Spec(tags=): its default was (), is None"),
        ("name: str\n", "name: str\n    owner: str\n", "pkg.Spec(owner=): was added without a default"),
        (", kw_only=True", "", None),
        ("x: int, y: int = 0", "x: int, y: int = 1", "pkg.run(y=): its default was 0, is 1"),
        ("x: int, y: int = 0", "x: int", "pkg.run(y=): was removed"),
        ("x: int, y: int = 0", "x: int, z: int, y: int = 0", "pkg.run(y=): has another position"),
        ("x: int, y: int = 0", "a: int, y: int = 0", "pkg.run(x=): was removed"),
        ("y: int = 0, *,", "*, y: int = 0,", "pkg.run(y=): has another position"),
        ("def run(x: int,", "def run(x: int, /,", "pkg.run(x=): was given by any, is given by position"),
        (", **settings: Any", "", "pkg.configure(**=): was removed"),
        ('*, device: str = "cpu", **settings', "**settings", None),
        ("keep: bool", "keep: bool, more: bool", "pkg.Op.__call__(more=): was added without a default"),
        ("async def wait", "def wait", "pkg.wait: was a async def, is a def"),
        ("@dataclass(frozen=True, kw_only=True)\n", "", "pkg.Spec: was a dataclass, is a class"),
    ],
)
def test_what_breaks(tmp_path: Path, old: str, new: str, expected: str | None) -> None:
    assert BEFORE.count(old) == 1
    before = record(tmp_path / "before", BEFORE)
    found = changes(before, record(tmp_path / "after", BEFORE.replace(old, new)))
    broken = [str(change) for change in found if change.breaks]
    assert broken == [] if expected is None else expected in broken


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("LIMIT = 3", "LIMIT = 3\nMORE = 1", "pkg.MORE: was added"),
        ("LIMIT = 3", "LIMIT = 3\nclass More:\n    x: int", "pkg.More: was added"),
        ('["a", "b"]', '["a", "b", "c"]', "pkg.Kind(c): was added"),
        ("_private = 1", "", None),
        (
            "y: int = 0, *, scale: float = 1.0",
            "y: int = 0, *, scale: float = 1.0, n: int = 1",
            "pkg.run(n=): was added",
        ),
        ("x: int, y: int = 0", "x: float, y: int = 0", "pkg.run(x=): its type was int, is float"),
        ("y: int = 0, *, scale", "y: int = 0, scale", None),
        ("name: str\n", "name: str | None = None\n", "pkg.Spec(name=): its type was str, is str | None"),
        (
            "tags: Sequence[str] = ()",
            "tags: Sequence[str] = ()\n    new: int = 0",
            "pkg.Spec(new=): was added",
        ),
    ],
)
def test_what_only_adds(tmp_path: Path, old: str, new: str, expected: str | None) -> None:
    assert BEFORE.count(old) == 1
    before = record(tmp_path / "before", BEFORE)
    found = changes(before, record(tmp_path / "after", BEFORE.replace(old, new)))
    assert not any(change.breaks for change in found)
    assert [str(change) for change in found] == ([] if expected is None else [expected])


def test_an_addition_is_listed_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "api-changes.md"
    page.write_text(
        "# Changes\n\n## 1.1 (unreleased)\n\n- `pkg.MORE`, `pkg.run(*=)`\n\n## 1.0\n\n`pkg.OLD`\n"
    )
    monkeypatch.setattr(api_snapshot, "CHANGES", page)
    before = ["pkg.LIMIT = 3", "def pkg.run()"]
    after = ["pkg.LIMIT = 3", "pkg.MORE = 1", "pkg.OLD = 1", "def pkg.run(n: int = 0)"]
    assert [change.name for change in unlisted(changes(before, after), "1.1")] == ["pkg.OLD"]
    assert api_snapshot.released("1.0")
    assert not api_snapshot.released("1.1")
