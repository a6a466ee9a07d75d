"""What a decode step costs besides arithmetic: launches, uploads, and downloads that the host waits for."""

from __future__ import annotations

from collections import Counter

import pytest

from opsin import LLM, SamplingParams
from tests.mlu_sim import CARD
from tests.models.golden import GOLDEN

STEPS = 10


def per_step(llm: LLM, count: int) -> Counter[str]:
    """What one more step of ``count`` sequences runs, on average of ten."""
    prompts = [f"question number {number}" for number in range(count)]
    traces = []
    for tokens in (4, 4, 4 + STEPS):  # the first fills caches
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        with CARD.recorded() as trace:
            llm.generate(prompts, params, use_tqdm=False)
        traces.append(Counter(trace))
    return Counter({name: (n - traces[1][name]) // STEPS for name, n in traces[2].items()})


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", ["qwen2vl", "phi3v", "minicpmv25"])
def test_a_decode_step(family: str, count: int) -> None:
    with LLM(str(GOLDEN / family / "model"), device="mlu", dtype="float16", kv_cache_memory=2**22) as llm:
        step = per_step(llm, count)
        layers = llm.engine.executor.model.kv_geometry.num_layers
    vendor = sum(n for name, n in step.items() if name.startswith("tmo::"))
    assert vendor == 10 * layers + 2
    assert step["upload"] == 1
    assert step["download"] == 2, "values and ids of the chosen tokens"
    assert not step["aten::sin"] > 1, "rotary tables are made once a step, not in each layer"
