"""The guide of the MLU370: both languages say the same; its commands run, as far as they can."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError
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


def closure(name: str) -> list[Distribution]:
    """A distribution and all that it needs here."""
    found: dict[str, Distribution] = {}
    todo = [name]
    while todo:
        one = re.match(r"[\w.-]+", todo.pop())[0].lower()  # type: ignore[index]
        if one in found:
            continue
        try:
            found[one] = Distribution.from_name(one)
        except PackageNotFoundError:  # of another platform, or an extra
            continue
        todo += [needed for needed in found[one].requires or () if "extra ==" not in needed]
    return list(found.values())


@pytest.mark.slow
def test_the_bundle_installs_without_a_network(tmp_path: Path) -> None:
    """Beside a torch that is there already, as a vendor's: an environment of its own that sees it."""
    bundle, fresh = tmp_path / "bundle", tmp_path / "opsin"
    subprocess.run([sys.executable, ROOT / "tools/bundle.py", bundle], check=True, capture_output=True)
    assert not list(bundle.glob("torch-*")), "torch comes with the machine"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True)
    vendor = tmp_path / "vendor"
    vendor.mkdir()
    for distribution in closure("torch"):
        for file in distribution.files or ():
            top = vendor / file.parts[0]
            if file.parts[0] != ".." and not top.exists():
                top.symlink_to(Path(str(distribution.locate_file(file.parts[0]))))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (fresh / "lib" / version / "site-packages/vendor.pth").write_text(f"{vendor}\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    names = [
        "opsin[serve]",
        *(f"opsin-{n}" for n in ("models-qwen2vl", "device-cpu", "device-mlu", "tiny-qwen2vl")),
    ]
    pip = [sys.executable, "-m", "pip", "--python", fresh / "bin/python", "install", "-q"]
    install = [*pip, "--no-index", "--find-links", bundle, *names]
    done = subprocess.run(install, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    asked = ["opsin/tiny-qwen2vl", "--device", "cpu", "--image", ROOT / "docs/images/scene.png"]
    done = subprocess.run(
        [fresh / "bin/opsin", "generate", *asked, "Describe the picture."],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "A yellow cross in the centre" in done.stdout, done.stderr[-2000:]
