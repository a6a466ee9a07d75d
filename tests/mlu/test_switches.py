"""Whichever reading of the open questions is true: right tokens, or a kernel declined with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opsin import LLM, SamplingParams
from opsin_device_mlu.device import exact_angles, open_device, probe
from tests.mlu.test_golden import NUM_STEPS, safe_len
from tests.mlu_sim import CARD, SWITCHES, use_ops
from tests.mlu_sim.switches import EACH
from tests.models.families import FAMILIES
from tests.models.golden import GOLDEN, cases

QUICK = ("minicpmv26", "qwen2vl")

SLOW = [name for name in sorted(FAMILIES) if name not in QUICK]
RUNS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]

DECLINED: dict[str, str] = {}
"""Reading -> what begins the name of a kernel that is not right under it. Everything else is used."""


def named(reading: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in reading.items()) or "the manual"


@pytest.mark.parametrize("reading", EACH, ids=named)
@pytest.mark.parametrize("family", RUNS)
def test_recorded_cases(family: str, reading: dict[str, str]) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS, ignore_eos=True)
    mine = cases(family)
    with SWITCHES.changed(**reading):
        use_ops("1.3.2")
        with LLM(str(GOLDEN / family / "model"), device="mlu", dtype="float16", kv_cache_memory=2**24) as llm:
            outputs = llm.generate([case.prompt() for case in mine], params, use_tqdm=False)
            declined = dict(llm.engine.executor.device.declined)
            reference = {c.op for c in llm.engine.executor.kernels.choices if c.provider != "mlu"}
    for case, output in zip(mine, outputs, strict=True):
        safe = safe_len(case, "float16")
        assert output.outputs[0].token_ids[:safe] == case.data["greedy_token_ids"][:safe], str(case)
    expected = expected_declined(reading)
    assert [name for name in declined if not name.startswith(expected)] == []
    assert reference - {"top_k"} <= ({"gated_act"} if expected else set()), declined


def expected_declined(reading: dict[str, str]) -> tuple[str, ...]:
    """Kernels that cannot be right under a reading. An approximate GELU is none of the exact ones."""
    return ("gated_act gelu",) if reading.get("gelu") == "tanh" else ()


@pytest.mark.parametrize(
    ("reading", "told"),
    [
        ({}, {"paged_attention 64 decoding": "windows -1 for none", "rotary": "where q and k stand"}),
        ({"window": "0"}, {"paged_attention 64 decoding": "windows 0 for none"}),
        ({"window": "both"}, {"paged_attention 64 decoding": "windows -1 for none"}),
        ({"rows": "ignored"}, {"rotary": "on a copy of q and k"}),
        ({"views": "refused"}, {"write_kv 64": "copies of views", "dense_attention 64": "copies of views"}),
        ({"views": "ignored"}, {"write_kv 64": "copies of views", "dense_attention 64": "copies of views"}),
        ({"names": "untold"}, {"linear": "in the callers' order"}),
        ({"names": "untold printed"}, {"paged_attention 64 over tables": "in the manual's order"}),
        ({"names": "printed"}, {"linear": "by the names of its arguments"}),
        ({"bias": "rows"}, {"linear": "bias (1, N)"}),
        ({"gelu": "tanh"}, {"linear": "applying silu, gelu_tanh"}),
        ({"gelu": "exact"}, {"linear": "applying silu, gelu"}),
    ],
    ids=lambda value: named(value) if value and isinstance(value, dict) and len(value) < 3 else None,
)
def test_how_kernels_are_called_is_told(reading: dict[str, str], told: dict[str, str]) -> None:
    with SWITCHES.changed(**reading):
        use_ops("1.3.2")
        details = open_device(0).details
    for kernel, how in told.items():
        assert how in details[f"  {kernel} in float16"], kernel


def test_rough_sines_are_left_to_the_host() -> None:
    """A small model's prompt is short: what is looked at is where the table is made, and that it is right."""
    traces = []
    for angles, where in (("right", "on the card"), ("rough", "on the host: its sines are not precise")):
        with SWITCHES.changed(angles=angles):
            exact_angles.cache_clear()
            with LLM(
                str(GOLDEN / "qwen2vl" / "model"), device="mlu", dtype="float16", kv_cache_memory=2**24
            ) as llm:
                assert llm.engine.executor.device.details["rotary tables"] == where
                with CARD.recorded() as trace:
                    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
                    [output] = llm.generate(["a question"], params, use_tqdm=False)
        traces.append((trace["aten::cos"], output.outputs[0].token_ids))
    assert traces[0][0] > 0
    assert traces[1] == (0, traces[0][1])


def broken(name: str, change: Any) -> None:
    """Replace a function of the package by a wrong one."""
    import torch_mlu_ops

    right = getattr(torch_mlu_ops, name)
    setattr(torch_mlu_ops, name, lambda *args, **kwargs: change(right, args, kwargs))


def nothing(right: Any, args: Any, kwargs: Any) -> Any:
    """It only seems to have done its work."""
    return kwargs.get("out")


def half_of_it(right: Any, args: Any, kwargs: Any) -> Any:
    result = right(*args, **kwargs)
    return tuple(x * 0.5 for x in result) if isinstance(result, tuple) else result * 0.5


def raising(right: Any, args: Any, kwargs: Any) -> Any:
    raise RuntimeError("Check failed: status == CNNL_STATUS_SUCCESS")


def exchanged(one: str, other: str) -> Any:
    return lambda right, args, kwargs: right(*args, **{**kwargs, one: kwargs[other], other: kwargs[one]})


WRONG = {
    "rms_norm": ("fused_rms_norm", half_of_it),
    "layer_norm": ("fused_layer_norm", raising),
    "gated_act silu": ("active", half_of_it),
    "rotary": ("apply_rotary", exchanged("sin_cache", "cos_cache")),
    "write_kv 64": ("reshape_paged_cache", exchanged("k", "v")),
    "dense_attention 64": ("flash_attention", nothing),
    "paged_attention 64 decoding": ("single_query_cached_kv_attn", nothing),
    "linear": ("matmul", half_of_it),
}


@pytest.mark.parametrize("kernel", WRONG)
def test_a_wrong_kernel_is_declined_by_name(kernel: str) -> None:
    """It is told in the log, by the doctor and by the probe; answers are right all the same."""
    name, change = WRONG[kernel]
    broken(name, change)
    opened = open_device(0)
    assert any(declined.startswith(f"{kernel} in float16") for declined in opened.declined), opened.declined
    found = probe()
    slow = kernel.startswith(("linear", "paged", "write")) or name == "flash_attention"
    assert found.score == (50 if slow else 100)
    assert "not used" in found.reason
    assert kernel in found.next_step
    case = cases("qwen2vl")[0]
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS, ignore_eos=True)
    with LLM(str(GOLDEN / "qwen2vl" / "model"), device="mlu", dtype="float16", kv_cache_memory=2**24) as llm:
        [output] = llm.generate([case.prompt()], params, use_tqdm=False)
    safe = safe_len(case, "float16")
    assert output.outputs[0].token_ids[:safe] == case.data["greedy_token_ids"][:safe]


def test_kernels_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    open_device(0)
    with CARD.recorded() as trace:
        open_device(0)
        probe()
    assert not any(name.startswith("tmo::") for name in trace), trace
    monkeypatch.setenv("OPSIN_MLU_HALF_SOFTMAX", "1")
    with CARD.recorded() as trace:
        open_device(0)
    assert trace["tmo::flash_attention"], "with other switches they are others"


def test_without_measuring_the_likeliest_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSIN_MLU_MEASURE", "0")
    use_ops("1.3.2")
    with SWITCHES.changed(window="0"), CARD.recorded() as trace:
        opened = open_device(0)
        assert "windows -1" in opened.details["  paged_attention 64 decoding in float16"]
    assert not any(name.startswith("tmo::") for name in trace)


TINY = [
    "opsin/tiny-qwen2vl",
    *(pytest.param(f"opsin/tiny-{name}", marks=pytest.mark.slow) for name in ("llava", "phi3v", "minicpmv")),
]


@pytest.mark.parametrize("model", TINY)
def test_a_model_that_answers_truly_does_so_under_each_reading(model: str) -> None:
    """Longer answers than those of the recorded cases, about a real picture."""
    scene = Path(__file__).parents[2] / "docs/images/scene.png"
    params = SamplingParams(temperature=0, max_tokens=24)
    parts = [{"type": "image", "image": str(scene)}, {"type": "text", "text": "Describe the picture."}]
    answers = {}
    for reading in EACH:
        with SWITCHES.changed(**reading):
            use_ops("1.3.2")
            with LLM(model, device="mlu", kv_cache_memory=2**24) as llm:
                [output] = llm.chat([{"role": "user", "content": parts}], params, use_tqdm=False)
        answers[named(reading)] = output.outputs[0].text.strip()
    expected = "A yellow cross in the centre and a black cross at the bottom left."
    assert answers == dict.fromkeys(answers, expected)
