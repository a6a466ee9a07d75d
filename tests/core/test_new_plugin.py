"""``opsin new-plugin``: what it writes installs into a fresh environment and passes its own tests."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.core.test_install import CORE, CPU, ROOT, Environment, make_environment

LLAVA = ROOT / "plugins/models_llava"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a device and a copy of a family, written by the command of an installed core."""
    folder = tmp_path_factory.mktemp("written")
    environment = make_environment(folder / "core", CORE, CPU, LLAVA)
    like = ("--like", "LlavaForConditionalGeneration")
    for kind, name, *more in (("model", "mine"), ("device", "mychip"), ("model", "twin", *like)):
        done = environment.opsin("new-plugin", kind, name, *more, "--folder", str(folder / name))
        assert done.returncode == 0, done.stderr
        assert f"pip install -e {folder / name}" in done.stdout
    return folder


@pytest.fixture(scope="module")
def environment(written: Path) -> Environment:
    packages = (written / name for name in ("mine", "mychip", "twin"))
    return make_environment(written / "env", CORE, CPU, LLAVA, *packages)


def test_they_are_found(environment: Environment) -> None:
    report = environment.report("plugins")
    assert report["failures"] == []
    provided = {f"{each['kind']}:{each['key']}": each["plugin"] for each in report["provides"]}
    assert provided["model:MineForConditionalGeneration"] == "models_mine"
    assert provided["input_mapper:MineForConditionalGeneration/image"] == "models_mine"
    assert provided["device:mychip"] == "device_mychip"
    assert provided["kernel:mychip/rms_norm"] == "device_mychip"
    assert provided["model:TwinForConditionalGeneration"] == "models_twin"
    assert provided["model:LlavaForConditionalGeneration"] == "models_llava"


@pytest.mark.parametrize("name", ["mine", "mychip", "twin"])
def test_they_pass_their_own_tests(environment: Environment, written: Path, name: str) -> None:
    begun = time.perf_counter()
    done = environment.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(written / name))
    lines = sum(len(file.read_text().splitlines()) for file in (written / name).rglob("src/*/*.py"))
    print(f"{name}: {lines} lines, {time.perf_counter() - begun:.0f} s, {done.stdout.splitlines()[-1]}")
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_nothing_is_written_over(environment: Environment, written: Path) -> None:
    before = {file: file.read_bytes() for file in (written / "mine").rglob("*") if file.is_file()}
    done = environment.opsin("new-plugin", "model", "mine", "--folder", str(written / "mine"))
    assert done.returncode == 1
    assert "nothing is written over" in done.stderr
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize(
    "arguments", [("model", "Mine-2"), ("device", "a", "--like", "X"), ("model", "a", "--like", "X")]
)
def test_what_cannot_be_is_refused(
    environment: Environment, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = environment.opsin("new-plugin", *arguments, "--folder", str(tmp_path / "a"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()
