"""pytest inside of the simulator: a plugin that runs the tests it is told to, one line of JSON each.

It reads ``[node id, next node id or null]`` from one pipe and writes the list of serialised reports to
another: ``OPSIN_SIMULATOR_PIPES`` names their file descriptors. (pytest captures the standard streams.)
"""

from __future__ import annotations

import json
import os

import pytest
from _pytest.runner import runtestprotocol

PIPES = "OPSIN_SIMULATOR_PIPES"


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    """Instead of running all that was collected."""
    items = {item.nodeid: item for item in session.items}
    reading, writing = map(int, os.environ[PIPES].split(","))
    with os.fdopen(reading) as requests, os.fdopen(writing, "w") as out:
        for line in requests:
            name, following = json.loads(line)
            reports = runtestprotocol(items[name], log=False, nextitem=items.get(following))
            hook = session.config.hook
            data = [hook.pytest_report_to_serializable(config=session.config, report=r) for r in reports]
            out.write(json.dumps(data, default=str) + "\n")
            out.flush()
    return True
