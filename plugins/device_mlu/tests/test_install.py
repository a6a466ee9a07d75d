"""The guide's command on a machine without a card: it installs, and asking for the card says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.test_install import ROOT, Environment, make_environment

MODEL = ROOT / "tests/golden/qwen2vl/model"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folders = ("core", "plugins/models_qwen2vl", "plugins/device_mlu")
    folder: Path = tmp_path_factory.mktemp("environment")
    return make_environment(folder, *(ROOT / name for name in folders))


def test_the_doctor_says_why_not_and_what_to_do(installed: Environment) -> None:
    report = installed.report("doctor", "--device", "mlu")
    assert [device["name"] for device in report["devices"]] == ["mlu"]
    [advice] = report["advice"]
    assert advice.startswith("device 'mlu' cannot be used: torch_mlu is not installed; ")
    assert "docs/devices/mlu370.md" in advice


@pytest.mark.parametrize("device", ["mlu", "auto"])
def test_asking_for_the_card_says_why_not(installed: Environment, device: str) -> None:
    result = installed.python(f"from opsin import LLM; LLM({str(MODEL)!r}, device={device!r})")
    assert result.returncode != 0
    assert "ConfigError" in result.stderr
    assert "torch_mlu is not installed" in result.stderr


def test_the_simulator_is_not_in_the_wheel(installed: Environment) -> None:
    files = [str(path) for path in installed.folder.rglob("*mlu*") if "opsin" in str(path)]
    assert any("opsin_device_mlu" in path for path in files)
    assert not any("mlu_sim" in path for path in files)
