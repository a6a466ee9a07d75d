"""What goes wrong between ranks is a clear error, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from opsin import LLM, AsyncEngine, EngineConfig, SamplingParams
from opsin.errors import CheckpointError, ConfigError, DeviceLostError, OpsinError
from opsin.rank.leader import LeadingRank
from tests.models.golden import GOLDEN

MODEL = str(GOLDEN / "qwen2vl" / "model")
SETTINGS: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 2**22, "tensor_parallel_size": 2}
LONG = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def followers(llm: LLM) -> list[psutil.Process]:
    leader = llm.engine.executor
    assert isinstance(leader, LeadingRank)
    return [psutil.Process(follower.process.pid) for follower in leader._followers]


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(MODEL, **{**SETTINGS, "tensor_parallel_timeout": 3}) as loaded:
        yield loaded


def while_it_computes(llm: LLM, act: Callable[[psutil.Process], None]) -> OpsinError:
    """What a long answer ends with, if something is done to rank 1 in the middle of it."""
    [other] = followers(llm)
    steps, step = 0, llm.engine.step

    def counted() -> Any:
        nonlocal steps
        steps += 1
        if steps == 20:
            threading.Timer(0.01, act, args=(other,)).start()
        return step()

    llm.engine.step = counted  # type: ignore[method-assign]
    with pytest.raises(DeviceLostError) as raised:
        llm.generate("Count", LONG, use_tqdm=False)
    assert 20 <= steps < 2000
    return raised.value


def test_a_rank_that_is_killed(llm: LLM) -> None:
    [other] = followers(llm)
    error = while_it_computes(llm, psutil.Process.kill)
    assert str(error) == f"rank 1 (process {other.pid}) ended by signal SIGKILL"
    with pytest.raises(DeviceLostError, match="SIGKILL"):  # and it stays lost
        llm.generate("Again", SHORT, use_tqdm=False)


def test_a_rank_that_is_stopped(llm: LLM) -> None:
    [other] = followers(llm)
    error = while_it_computes(llm, psutil.Process.suspend)
    assert "rank 1 has not come to a step for 3 s" in str(error)
    assert not other.is_running()


def test_without_shared_memory_the_group_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSIN_CPU_NATIVE", "0")
    code = f"""
import os, signal, threading
from opsin import LLM, SamplingParams
from opsin.errors import DeviceLostError
llm = LLM({MODEL!r}, **{SETTINGS!r})
pid = llm.engine.executor._followers[0].process.pid
threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
try:
    llm.generate("Count", SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True), use_tqdm=False)
except DeviceLostError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "ended by signal SIGKILL" in done.stdout


def test_an_idle_engine_notices_too() -> None:
    async def watch() -> BaseException | None:
        engine = AsyncEngine.from_config(EngineConfig(model=MODEL, **SETTINGS))
        leader = engine.engine.executor
        assert isinstance(leader, LeadingRank)
        leader._followers[0].process.kill()
        while engine.death is None:
            await asyncio.sleep(0.05)
        engine.close()
        return engine.death

    assert isinstance(death := asyncio.run(watch()), DeviceLostError)
    assert "SIGKILL" in str(death)


FAULTS = {
    "an error of ours": (
        "raise CheckpointError('the disk is rotten')",
        CheckpointError,
        "rank 1: the disk is rotten",
    ),
    "any error": (
        "raise ZeroDivisionError('of all things')",
        DeviceLostError,
        "rank 1: ZeroDivisionError: of all",
    ),
    "an end": ("os._exit(7)", DeviceLostError, "ended with status 7"),
    "a kill": ("os.kill(os.getpid(), 9)", DeviceLostError, "ended by signal SIGKILL"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_rank_that_fails_to_load(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    action, error, text = FAULTS[kind]
    (tmp_path / "sitecustomize.py").write_text(
        f"""import os, sys
if "opsin.rank" in sys.orig_argv:
    from opsin.errors import CheckpointError
    from opsin.rank import local

    def fails(*args, **options):
        {action}

    local.load_weights = fails
"""
    )
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(error, match=text):
        LLM(MODEL, **SETTINGS)
    assert {child.pid for child in psutil.Process().children()} <= before


def test_ranks_end_with_a_killed_engine() -> None:
    code = f"""
from opsin import LLM, SamplingParams
llm = LLM({MODEL!r}, **{SETTINGS!r})
print(llm.engine.executor._followers[0].process.pid, flush=True)
while True:
    llm.generate("Count", SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True), use_tqdm=False)
"""
    shared = Path("/dev/shm")
    before = set(shared.iterdir())
    engine = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    rank = psutil.Process(int(engine.stdout.readline()))
    time.sleep(0.2)
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    gone, alive = psutil.wait_procs([rank], timeout=5)
    assert gone
    assert not alive
    assert set(shared.iterdir()) <= before


def test_closing_ends_all_ranks(llm: LLM) -> None:
    [other] = followers(llm)
    affinity = os.sched_getaffinity(0)
    llm.close()
    assert not other.is_running()
    assert os.sched_getaffinity(0) >= affinity


def test_several_engines_at_once() -> None:
    with LLM(MODEL, **{**SETTINGS, "tensor_parallel_size": 1}) as alone:
        expected = alone.generate("Count", SHORT, use_tqdm=False)[0].outputs[0].token_ids
    with LLM(MODEL, **SETTINGS) as one, LLM(MODEL, **SETTINGS) as other:
        found: dict[str, Any] = {}

        def ask(name: str, llm: LLM) -> None:
            for _ in range(5):
                found[name] = llm.generate("Count", SHORT, use_tqdm=False)[0].outputs[0].token_ids

        threads = [threading.Thread(target=ask, args=pair) for pair in (("one", one), ("other", other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {"one": expected, "other": expected}


def test_heads_that_cannot_be_divided_are_named() -> None:
    with pytest.raises(ConfigError, match=r"4 query heads and 2 key/value heads .* possible are 1, 2, 4$"):
        LLM(MODEL, **{**SETTINGS, "tensor_parallel_size": 3})


def test_plugins_of_one_process_are_refused() -> None:
    from opsin.plugins import load_plugins

    with pytest.raises(ConfigError, match="leave plugins out"):
        LLM(MODEL, plugins=load_plugins(), **SETTINGS)
