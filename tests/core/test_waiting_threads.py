"""OpenMP's threads soon sleep while they wait, unless the user wants it otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def waits(code: str, **settings: str) -> dict[str, str]:
    """What torch's OpenMP says that it was told, once ``code`` has loaded torch."""
    kept = {name: value for name, value in os.environ.items() if name not in SPINNING}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "OMP_DISPLAY_ENV": "verbose", **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line.partition(" = ") for line in (result.stderr + result.stdout).splitlines())
    told = {name.split()[-1]: value.strip().strip("'") for name, equals, value in lines if equals}
    if "GOMP_SPINCOUNT" not in told:
        pytest.fail(f"this torch's OpenMP does not say how it waits: {result.stderr!r}")
    return told


@pytest.mark.parametrize("code", ["from opsin import LLM", "import opsin.cli; import torch"])
def test_they_soon_sleep(code: str) -> None:
    assert waits(code)["GOMP_SPINCOUNT"] == "3000"


def test_without_opsin_they_spin_long() -> None:
    """Else the test above would show nothing."""
    assert int(waits("import torch")["GOMP_SPINCOUNT"]) > 3000


@pytest.mark.parametrize(
    ("name", "value", "turns"),
    [("OMP_WAIT_POLICY", "passive", "0"), ("GOMP_SPINCOUNT", "12345", "12345")],
)
def test_what_the_user_has_set_stays(name: str, value: str, turns: str) -> None:
    assert waits("from opsin import LLM", **{name: value})["GOMP_SPINCOUNT"] == turns
