"""Two ranks on two simulated chips, over the simulated cncl, come to what the CPU comes to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed

from opsin import LLM, SamplingParams
from opsin.errors import ConfigError
from tests.mlu_sim import CARD
from tests.models.families import FAMILIES
from tests.models.golden import GOLDEN, cases

ROOT = Path(__file__).parents[2]
SIMULATED = """import sys
if "opsin.rank" in sys.orig_argv:
    from tests.mlu_sim import CARD, install
    install()
    CARD.num_devices = 2
"""
NUM_STEPS = 16


@pytest.fixture(autouse=True)
def _ranks_with_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What an owner's ranks find installed, these are given."""
    (tmp_path / "sitecustomize.py").write_text(SIMULATED)
    known = filter(None, [os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), *known]))
    with CARD.changed(num_devices=2, name="MLU370-X8"):
        yield


def model(family: str, **settings: object) -> LLM:
    folder = str(GOLDEN / family / "model")
    return LLM(folder, device="mlu", dtype="float32", kv_cache_memory=2**24, **settings)


USUAL = ("phi3v", "qwen2vl", "qwen3vl")
"""Fused tensors, repeated key/value heads, features for early layers; the others run in `make test-full`."""


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in USUAL else pytest.mark.slow) for f in sorted(FAMILIES)]
)
def test_recorded_cases(family: str) -> None:
    mine = cases(family)
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS, ignore_eos=True, logprobs=0)
    prompts = [case.prompt() for case in mine]
    with model(family) as alone:
        expected = alone.generate(prompts, params, use_tqdm=False)
    with model(family, tensor_parallel_size=2) as llm:
        assert torch.distributed.get_backend() == "cncl"
        assert llm.engine.executor.device.torch_device == "mlu:0"
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for case, output, other in zip(mine, outputs, expected, strict=True):
        safe = case.data["greedy_safe_len"]
        assert output.outputs[0].token_ids[:safe] == case.data["greedy_token_ids"][:safe], str(case)
        pairs = zip(output.outputs[0].logprobs[:safe], other.outputs[0].logprobs[:safe], strict=True)
        for one, two in pairs:
            [mine_], [theirs] = one.values(), two.values()
            assert abs(mine_.logprob - theirs.logprob) < 1e-4, str(case)


def test_a_second_engine_is_refused_while_the_backend_has_one_group() -> None:
    refused = pytest.raises(ConfigError, match="default group in this process already")
    with model("qwen2vl", tensor_parallel_size=2), refused:
        model("qwen2vl", tensor_parallel_size=2)
    with model("qwen2vl", tensor_parallel_size=2) as again:  # once it is closed, the next may come
        assert again.generate("Count", SamplingParams(max_tokens=2), use_tqdm=False)
