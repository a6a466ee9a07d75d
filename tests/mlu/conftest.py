"""Every test of this folder runs in another process, beside a simulated MLU370 (tests/mlu_sim)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mlu_sim import CARD, SWITCHES, installed, use_ops
from tests.mlu_sim.remote import run_in_simulator

FOLDER = Path(__file__).parent
OLD, NEW = "1.3.2", "1.8.0"


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    # Under importlib mode the hook is called for tests of other folders too.
    if installed() or FOLDER not in item.path.parents:
        return None
    return run_in_simulator(item, nextitem, FOLDER)


@pytest.fixture(params=[OLD, NEW])
def ops(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each generation of the kernel package in turn."""
    use_ops(request.param)
    yield str(request.param)
    use_ops(OLD)


@pytest.fixture(autouse=True)
def _fresh_card() -> Iterator[None]:
    """Nothing that a test did to card or package stays."""
    from opsin_device_mlu.device import exact_angles

    CARD.trace.clear()
    CARD.wide.clear()
    yield
    exact_angles.cache_clear()
    use_ops(OLD)


@contextmanager
def exactly() -> Iterator[None]:
    """A card whose kernels all take float32, used so: token for token, nothing is a matter of rounding."""
    with SWITCHES.changed(float32="right"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPSIN_MLU_FLOAT32", "1")
        yield


@pytest.fixture(scope="module")
def exact() -> Iterator[None]:
    """`exactly`, for a whole file."""
    with exactly():
        yield


@pytest.fixture
def ops_missing() -> Iterator[None]:
    """torch_mlu_ops is not installed."""
    use_ops("none")
    yield
    use_ops(OLD)
