"""``opsin doctor --report`` without a card: nothing private, and no device's trouble ends it."""

from __future__ import annotations

import socket
import zipfile
from pathlib import Path

import pytest

from opsin.cli.doctor.report import without_names, write_report


def test_names_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "bigbox")
    monkeypatch.setenv("LOGNAME", "someone")
    monkeypatch.setenv("HOME", "/srv/people/someone")
    text = "/srv/people/someone/models on bigbox, /home/other/x, /Users/third/y by someone; bigboxes"
    assert without_names(text) == "~/models on (name), ~/x, ~/y by (name); bigboxes"


def test_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "report.zip"
    names = write_report(path, {"advice": []}, {"chip/log.txt": "fine", "chip/dump.bin": b"\x00\xff"})
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == names == [
            "README.txt", "doctor.json", "packages.txt", "chip/log.txt", "chip/dump.bin",
        ]  # fmt: skip
        assert archive.read("chip/dump.bin") == b"\x00\xff"
        assert "opsin==" in archive.read("packages.txt").decode()
    with pytest.raises(FileExistsError):
        write_report(path, {}, {})
