"""The packages of this repository: licence, page, version and neighbours of each."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL: dict[str, Any] = runpy.run_path(str(ROOT / "tools/packages.py"))
PACKAGES: list[Path] = TOOL["packages"]()
IDS = [str(package.relative_to(ROOT)) for package in PACKAGES]


def name_of(package: Path) -> str:
    [name] = re.findall(r'^name = "(.+)"$', (package / "pyproject.toml").read_text(), re.MULTILINE)
    return str(name)


@pytest.mark.parametrize("package", PACKAGES, ids=IDS)
def test_licence_and_page(package: Path) -> None:
    assert (package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (package / "README.md").read_text().startswith("# opsin")
    project = (package / "pyproject.toml").read_text()
    for line in ('readme = "README.md"', 'license = "Apache-2.0"', 'license-files = ["LICENSE"]'):
        assert line in project.splitlines(), line


def test_one_version() -> None:
    assert len({TOOL["version_of"](package) for package in PACKAGES}) == 1


def test_opsin_all_needs_every_other_package() -> None:
    """As `all/siblings.py` lists them: a new plugin that is not there would be missed by its users."""
    sys.modules.pop("hatchling.metadata.plugin.interface", None)
    siblings = runpy.run_path(str(ROOT / "all/siblings.py"))
    listed = {"opsin", *(f"opsin-{name}" for name in (*siblings["PLUGINS"], *siblings["DEMO"]))}
    assert listed == {name_of(package) for package in PACKAGES} - {"opsin-all"}
    for package in PACKAGES[1:-1]:
        assert package.name.replace("_", "-") == name_of(package).removeprefix("opsin-")


@pytest.mark.parametrize("release", [False, True])
def test_opsin_all_is_by_path_in_a_clone_and_by_name_in_a_release(
    release: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    siblings = runpy.run_path(str(ROOT / "all/siblings.py"))
    (monkeypatch.setenv if release else monkeypatch.delenv)("OPSIN_RELEASE", *(["1"] if release else [False]))
    hook = siblings["Siblings"](str(ROOT / "all"), {})
    metadata: dict[str, Any] = {"version": "7.8.9"}
    hook.update(metadata)
    needed = metadata["dependencies"] + metadata["optional-dependencies"]["demo"]
    if release:
        assert all(requirement.endswith("==7.8.9") for requirement in needed)
    else:
        folders = [Path(requirement.partition(" @ file://")[2]) for requirement in needed]
        assert set(folders) == set(PACKAGES[:-1])
    # Unpacked anywhere else, there is nothing beside it.
    shutil.copytree(ROOT / "all", tmp_path / "all")
    siblings["Siblings"](str(tmp_path / "all"), {}).update(metadata)
    assert metadata["dependencies"][:2] == ["opsin==7.8.9", "opsin[serve]==7.8.9"]


def test_one_command_raises_all_versions(tmp_path: Path) -> None:
    for package in PACKAGES:
        copy = tmp_path / package.relative_to(ROOT)
        copy.mkdir(parents=True)
        shutil.copy(package / "pyproject.toml", copy)
    (tmp_path / "core/src/opsin").mkdir(parents=True)
    shutil.copy(ROOT / "core/src/opsin/__init__.py", tmp_path / "core/src/opsin")
    (tmp_path / "tools").mkdir()
    tool = shutil.copy(ROOT / "tools/packages.py", tmp_path / "tools")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, tool, *arguments], capture_output=True, text=True, check=False)

    before = run("list").stdout
    assert "2.5" in run("version", "2.5").stderr
    assert run("list").stdout == before
    run("version", "2.5.0rc1").check_returncode()
    lines = run("list").stdout.splitlines()
    assert len(lines) == len(PACKAGES)
    assert all(line.startswith("2.5.0rc1 ") for line in lines)
    assert '"opsin>=2.5,<3"' in (tmp_path / "plugins/device_cpu/pyproject.toml").read_text()
