"""Running the tests of a folder in a process with the simulated card, reported as if they ran here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.mlu_sim.worker import PIPES

ROOT = Path(__file__).parents[2]


class SimulatorProcess:
    """A pytest in the simulator that has collected a folder and waits for node ids."""

    def __init__(self, folder: Path) -> None:
        their_reading, our_writing = os.pipe()
        our_reading, their_writing = os.pipe()
        command = [sys.executable, "-m", "tests.mlu_sim", "-m", "pytest", str(folder)]
        self._process = subprocess.Popen(
            [*command, "-m", "", "-q", "-p", "tests.mlu_sim.worker", "-p", "no:cacheprovider"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(their_reading, their_writing),
            env={**os.environ, PIPES: f"{their_reading},{their_writing}"},
            text=True,
        )
        os.close(their_reading)
        os.close(their_writing)
        self._requests, self._reports = os.fdopen(our_writing, "w"), os.fdopen(our_reading)

    def run(self, item: pytest.Item, following: str | None) -> list[pytest.TestReport]:
        """Run one test there. A simulator that died is that test's failure."""
        try:
            self._requests.write(json.dumps([item.nodeid, following]) + "\n")
            self._requests.flush()
            line = self._reports.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return [self._death(item)]
        hook = item.config.hook
        return [hook.pytest_report_from_serializable(config=item.config, data=d) for d in json.loads(line)]

    @property
    def alive(self) -> bool:
        """Whether it can run tests."""
        return self._process.poll() is None

    def close(self) -> None:
        """Let it end."""
        if self.alive:
            self._requests.close()
            self._process.communicate()
        self._reports.close()

    def _death(self, item: pytest.Item) -> pytest.TestReport:
        output = self._process.communicate()[0]
        text = f"the simulator ended with status {self._process.returncode}:\n{output[-8000:]}"
        return pytest.TestReport(
            item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", text, "call"
        )


_KEY = pytest.StashKey[SimulatorProcess]()


def run_in_simulator(item: pytest.Item, nextitem: pytest.Item | None, folder: Path) -> bool:
    """A ``pytest_runtest_protocol`` for the tests of a folder."""
    stash: Any = item.config.stash
    if _KEY not in stash or not stash[_KEY].alive:
        stash[_KEY] = SimulatorProcess(folder)
        item.config.add_cleanup(stash[_KEY].close)
    inside = nextitem is not None and folder in nextitem.path.parents
    following = nextitem.nodeid if nextitem is not None and inside else None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in stash[_KEY].run(item, following):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
