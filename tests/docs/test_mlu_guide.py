"""The guide of the MLU370: both languages say the same; its commands run, as far as they can."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = (ROOT / "docs/devices" / name for name in ("mlu370.md", "mlu370.zh.md"))


def parts(text: str) -> tuple[list[int], list[str], list[list[str]]]:
    """Levels of headings, code blocks, and of each table the first cells that are no prose."""
    code = [re.sub(r"(?m)^ +", "", block) for block in re.findall(r"```.*?```", text, re.DOTALL)]
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = [len(marks) for marks in re.findall(r"(?m)^(#+) ", plain)]
    tables = [
        [f"{len(row.split('|'))} cells" for row in table.strip().split("\n")]
        for table in re.findall(r"(?:^\|.*\n)+", plain, re.MULTILINE)
    ]
    return headings, code, tables


def test_both_languages_have_the_same_parts() -> None:
    english, chinese = (parts(path.read_text()) for path in (ENGLISH, CHINESE))
    assert english == chinese


def test_both_languages_name_the_same_things() -> None:
    """Commands, variables, files and numbers of tables."""
    for pattern in (
        r"OPSIN_MLU_[A-Z0-9_]+",
        r"`(opsin [^`]+)`",
        r"tests/[\w/.]+",
        r"\d+\.\d+ GiB",
        r"\d\d\.\d %",
    ):
        english, chinese = (re.findall(pattern, path.read_text()) for path in (ENGLISH, CHINESE))
        assert sorted(set(english)) == sorted(set(chinese)), pattern


def commands() -> list[str]:
    """What the first hour has an owner type, of what needs no real checkpoint."""
    text = ENGLISH.read_text()
    hour = text[text.index("## The first hour") : text.index("## Devices")]
    found = re.findall(r"`((?:OPSIN_MLU_OPS=0 )?opsin [^`]+)`", hour) + re.findall(
        r"(?m)^ +(opsin .+)$", hour
    )
    return [line for line in found if "Qwen/" not in line]


def test_the_first_hour_has_its_commands() -> None:
    assert len(commands()) == 6


def in_the_simulator(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(line)
    settings = dict(word.split("=") for word in words if word.startswith("OPSIN_MLU_"))
    arguments = [word for word in words if word not in ("opsin", *(f"{k}={v}" for k, v in settings.items()))]
    arguments = [str(folder / word) if word == "report.zip" else word for word in arguments]
    return subprocess.run(
        [sys.executable, "-m", "tests.mlu_sim", "-m", "opsin", *arguments],
        cwd=ROOT,
        env={**os.environ, **settings, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("line", [line for line in commands() if "selftest" not in line])
def test_a_command(line: str, tmp_path: Path) -> None:
    done = in_the_simulator(line, tmp_path)
    assert done.returncode == 0, done.stderr
    if "generate" in line:
        assert "A yellow cross in the centre and a black cross at the bottom left." in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in commands() if "selftest" in line])
def test_a_self_test(line: str, tmp_path: Path) -> None:
    done = in_the_simulator(line, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Everything is in order." in done.stdout
