"""Every family's recorded cases on the simulated card, in float32 and float16, on the vendor's kernels."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import cast

import pytest
from torch import nn

from opsin import LLM, SamplingParams
from opsin.layers import LayerNorm
from tests.mlu.conftest import exactly
from tests.mlu_sim import CARD
from tests.models.families import FAMILIES
from tests.models.golden import GOLDEN, Case, cases, recorded_logits

NUM_STEPS = 16

TOLERANCE = {"float32": 1e-4, "float16": 0.1}
"""Of logits that go up to 15. float16's largest error over all cases is 0.065."""

FLOAT16_MARGIN = 0.04
"""Between the two best logits: twice float16's usual error. Below, the winner is a matter of rounding."""

VENDOR_OPS = (
    "matmul",
    "fused_layer_norm",
    "fused_rms_norm",
    "apply_rotary",
    "active",
    "reshape_paged_cache",
    "flash_attention",
    "single_query_cached_kv_attn",
)

REFERENCE_ONLY = ("aten::softmax", "aten::_softmax", "aten::bmm", "aten::mm", "aten::addmm", "aten::rsqrt")
"""What the reference kernels are made of."""


def safe_len(case: Case, dtype: str) -> int:
    """How many greedy tokens are decided by more than rounding."""
    recorded = int(case.data["greedy_safe_len"])
    if dtype == "float32":
        return recorded
    best = case.tensors["step_logits"].topk(2, dim=-1).values
    close = ((best[:, 0] - best[:, 1]) < FLOAT16_MARGIN).nonzero()
    return min([recorded, *close.flatten().tolist()])


@pytest.fixture(params=["float32", "float16"])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both, on the vendor's kernels: float32 as if the manual listed it everywhere."""
    if request.param == "float32":
        with exactly():
            yield request.param
    else:
        yield request.param


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_float32_as_the_manual_lists_it(family: str) -> None:
    """Products, gates and the tower's attention are the vendor's; the rest is the reference's."""
    case = cases(family)[0]
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS, ignore_eos=True)
    with LLM(str(GOLDEN / family / "model"), device="mlu", dtype="float32", kv_cache_memory=2**24) as llm:
        [output] = llm.generate([case.prompt()], params, use_tqdm=False)
        own = {choice.op for choice in llm.engine.executor.kernels.choices if choice.provider == "mlu"}
    assert own <= {"prepare_linear", "gated_act", "dense_attention"}
    safe = int(case.data["greedy_safe_len"])
    assert output.outputs[0].token_ids[:safe] == case.data["greedy_token_ids"][:NUM_STEPS][:safe]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_recorded_cases(family: str, dtype: str, ops: str) -> None:
    mine = cases(family)
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS, ignore_eos=True)
    with LLM(str(GOLDEN / family / "model"), device="mlu", dtype=dtype, kv_cache_memory=2**24) as llm:
        outputs = llm.generate([case.prompt() for case in mine], params, use_tqdm=False)
        choices = llm.engine.executor.kernels.choices
        modules = cast(nn.Module, llm.engine.executor.model).modules()
        unused = set() if any(isinstance(m, LayerNorm) for m in modules) else {"fused_layer_norm"}
        # Searching rows is torch's own there.
        assert [choice.op for choice in choices if choice.provider == "reference"] == ["top_k"]
    for case, output in zip(mine, outputs, strict=True):
        assert output.prompt_token_ids == case.token_ids()
        safe = safe_len(case, dtype)
        assert output.outputs[0].token_ids[:safe] == case.data["greedy_token_ids"][:safe], str(case)
    assert all(CARD.trace[f"tmo::{op}"] for op in VENDOR_OPS if op not in unused), CARD.trace
    assert not any(CARD.trace[op] for op in REFERENCE_ONLY), CARD.trace
    assert not CARD.wide, "64-bit arithmetic on the card"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_first_logits(family: str, dtype: str) -> None:
    """Later ones follow the tokens chosen; the first follow the prompt alone."""
    params = SamplingParams(temperature=0, max_tokens=1)
    with LLM(str(GOLDEN / family / "model"), device="mlu", dtype=dtype, kv_cache_memory=2**24) as llm:
        for case in cases(family):
            with recorded_logits(llm) as logits:
                llm.generate(case.prompt(), params, use_tqdm=False)
            given = logits[0].cpu().float()
            assert (given - case.tensors["step_logits"][:1]).abs().max() < TOLERANCE[dtype], str(case)


def test_every_family_can_run_on_the_reference_kernels_alone(ops_missing: None) -> None:
    gc.collect()
    before = CARD.allocated[0]
    for family in sorted(FAMILIES):
        case = cases(family)[0]
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        with LLM(str(GOLDEN / family / "model"), device="mlu", dtype="float32", kv_cache_memory=2**24) as llm:
            [output] = llm.generate([case.prompt()], params, use_tqdm=False)
            assert not [c for c in llm.engine.executor.kernels.choices if c.provider == "mlu"]
        safe = min(4, case.data["greedy_safe_len"])
        assert output.outputs[0].token_ids[:safe] == case.data["greedy_token_ids"][:safe]
    assert not any(name.startswith("tmo::") for name in CARD.trace)
    del llm
    gc.collect()
    assert CARD.allocated[0] == before, "a closed engine holds device memory"
