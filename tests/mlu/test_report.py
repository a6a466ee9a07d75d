"""``opsin doctor --report``: what an owner sends back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.mlu.test_doctor import ROOT


def doctor(*arguments: str, switches: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    simulator = [sys.executable, "-m", "tests.mlu_sim", *(x for s in switches for x in ("--switch", s))]
    environment = {**os.environ, "OPSIN_MLU_GRAPHS": "1"}
    return subprocess.run(
        [*simulator, "-m", "opsin", "doctor", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_one_archive_has_it_all(tmp_path: Path) -> None:
    path = tmp_path / "report.zip"
    done = doctor("--device", "mlu", "--report", str(path), switches=("gelu=tanh",))
    assert done.returncode == 1, "a kernel is declined"
    assert f"Written to {path}" in done.stderr
    with zipfile.ZipFile(path) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert "gated_act gelu in float16: tried" in texts["mlu/kernels.txt"]
    assert "single_query_cached_kv_attn(q: 'Tensor'" in texts["mlu/signatures.txt"]
    assert "OPSIN_MLU_GRAPHS=1" in texts["mlu/environment.txt"]
    assert texts["mlu/cnmon.txt"].startswith("$ cnmon\nnot found")
    assert "mlu/gen_case/active.txt" in texts
    assert any(line.startswith("torch==") for line in texts["packages.txt"].splitlines())
    report = json.loads(texts["doctor.json"])
    assert report["opened"]["card"].startswith("MLU370")
    assert set(texts) - {"README.txt"} <= set(texts["README.txt"].split())
    assert str(Path.home()) not in "".join(texts.values())

    again = doctor("--report", str(path))
    assert again.returncode == 2 or "is there already" in again.stderr
