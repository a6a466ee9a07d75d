"""What can go wrong with a card, its driver and its packages: each with its message, and the engine lives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from opsin import LLM, SamplingParams
from opsin.api import AttentionBatch, Probe
from opsin.errors import ConfigError
from opsin.plugins import load_plugins
from opsin.testing.kernels import check_kernel, kernel_cases
from opsin_device_mlu.device import open_device
from opsin_device_mlu.plugin import opsin_register_devices, opsin_register_kernels
from tests.mlu_sim import CARD, SWITCHES, use_ops
from tests.models.golden import GOLDEN, picture

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [f"question number {number} of several about nothing at all" for number in range(4)]


def load(**settings: Any) -> LLM:
    settings = {"device": "mlu", "dtype": "float16", "kv_cache_memory": 2**20, **settings}
    return LLM(str(GOLDEN / "qwen2vl" / "model"), **settings)


def probe() -> Probe:
    [spec] = opsin_register_devices()
    return spec.probe()


@pytest.fixture
def _not_imported() -> Iterator[None]:
    """torch_mlu is imported anew by whoever asks."""
    kept = sys.modules.pop("torch_mlu", None)
    yield
    if kept is not None:
        sys.modules["torch_mlu"] = kept


@pytest.mark.usefixtures("_not_imported")
@pytest.mark.parametrize(
    "fault",
    [OSError("libcnrt.so: cannot open shared object file"), ImportError("undefined symbol: _ZN5torch")],
)
def test_a_driver_or_library_that_is_missing(fault: Exception) -> None:
    with CARD.changed(fault=fault):
        found = probe()
        with pytest.raises(ConfigError, match="cnmon"):
            load()
    assert found.score == 0
    assert str(fault) in found.reason
    assert "cnmon" in found.next_step


def test_no_card() -> None:
    with CARD.changed(num_devices=0):
        found = probe()
    assert (found.score, found.reason) == (0, "torch_mlu sees no device")
    assert "cnmon" in found.next_step


@pytest.mark.parametrize("variable", ["CN_VISIBLE_DEVICES", "MLU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"])
def test_a_variable_that_hides_the_card_is_named(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "")
    found = probe()
    assert found.score == 0
    assert f"{variable}=''" in found.reason
    assert found.next_step == f"correct or unset {variable}"
    with pytest.raises(ConfigError, match=variable):
        load()


def test_the_first_of_the_variables_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLU_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("CN_VISIBLE_DEVICES", "1")
    with CARD.changed(num_devices=2):
        assert probe().details["devices"] == "1 (CN_VISIBLE_DEVICES=1)"


def test_without_ops_the_probe_says_what_is_lost(ops_missing: None) -> None:
    found = probe()
    assert 0 < found.score < 100
    assert "torch_mlu_ops is not installed: everything runs on the reference kernels" in found.reason
    assert "docs/devices/mlu370.md" in found.next_step


def test_a_healthy_card_wins_over_the_cpu() -> None:
    spec, index, found = load_plugins().select_device("auto")
    assert (spec.name, index) == ("mlu", 0)
    assert found.reason == "1 × MLU370-S4, torch_mlu_ops 1.3.2"


def test_an_index_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match='"mlu:3": 1 visible; pass device="mlu:0"'):
        load(device="mlu:3")


def test_bfloat16_is_refused_with_what_to_pass_instead() -> None:
    with pytest.raises(ConfigError, match=r'MLU370-S4 \(capability 3.7\) .* pass dtype="float16"'):
        load(dtype="bfloat16")


def test_a_bfloat16_checkpoint_is_cast_while_it_is_loaded() -> None:
    with LLM(str(GOLDEN / "minicpmv26" / "model"), device="mlu", kv_cache_memory=2**20) as llm:
        assert llm.engine.checkpoint.dtype == "bfloat16"
        assert llm.engine.resolved.dtype == "float16"


def test_a_later_card_keeps_bfloat16() -> None:
    with CARD.changed(major=5, name="MLU590"):
        assert open_device(0).capabilities.dtype_for["bfloat16"] == "bfloat16"


def test_weights_that_do_not_fit() -> None:
    with CARD.changed(total_memory=CARD.allocated[0] + 2**17), pytest.raises(ConfigError) as caught:
        load()
    assert "no room for the weights on mlu:0" in str(caught.value)
    assert "MLU out of memory" in str(caught.value)


def test_a_cache_that_does_not_fit() -> None:
    with CARD.changed(total_memory=CARD.allocated[0] + 2**24):
        with pytest.raises(ConfigError, match="no room for the KV cache .* smaller kv_cache_memory"):
            load(kv_cache_memory=2**26)
        with load(kv_cache_memory=None) as llm:  # what is free is asked for, and there is enough of it
            assert llm.generate(PROMPTS[0], PARAMS, use_tqdm=False)[0].outputs[0].token_ids


def test_out_of_memory_in_a_step_that_fits_one_by_one() -> None:
    """A batch that is too large is computed in pieces; nobody fails."""
    with load() as llm:
        wanted = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
    with load(enable_prefix_caching=False) as llm:
        peak = _peak(llm, PROMPTS[:1])
        with CARD.changed(total_memory=CARD.allocated[0] + peak + 2**10):
            outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == wanted


def _peak(llm: LLM, prompts: list[str]) -> int:
    """Bytes beyond what is held, for answering."""
    before = CARD.allocated[0]
    CARD.peak[0] = before
    llm.generate(prompts, PARAMS, use_tqdm=False)
    return CARD.peak[0] - before


def test_out_of_memory_in_a_request_that_fits_never() -> None:
    long = "word " * 600
    with load(kv_cache_memory=2**22, enable_prefix_caching=False) as llm:
        wanted = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        peak = _peak(llm, PROMPTS)
        with CARD.changed(total_memory=CARD.allocated[0] + peak + 2**14):
            outputs = llm.generate([*PROMPTS, long], PARAMS, use_tqdm=False, on_error="return")
        assert "out of memory" in str(outputs[-1].error)
        assert [o.outputs[0].token_ids for o in outputs[:-1]] == [o.outputs[0].token_ids for o in wanted]
        assert llm.engine.stats().kv_blocks_used == 0
        # The engine lives, and with room again the request too.
        assert llm.generate(long, PARAMS, use_tqdm=False)[0].outputs[0].token_ids


def test_out_of_memory_in_the_encoder_fails_the_request_with_the_picture() -> None:
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    large = {
        "prompt": f"{mark}?",
        "multi_modal_data": {"image": picture("coffee_320x213.png").resize((640, 480))},
        "mm_processor_kwargs": {"max_pixels": 2**20},
    }
    with load(kv_cache_memory=2**22, enable_prefix_caching=False) as llm:
        peak = _peak(llm, PROMPTS)
        with CARD.changed(total_memory=CARD.allocated[0] + peak + 2**14):
            outputs = llm.generate([PROMPTS[0], large], PARAMS, use_tqdm=False, on_error="return")
        assert outputs[0].error is None
        assert "the image could not be encoded: OutOfMemoryError" in str(outputs[1].error)
        assert llm.generate([large], PARAMS, use_tqdm=False)[0].outputs[0].token_ids


def test_a_kernel_that_raises_fails_the_request_and_not_the_engine() -> None:
    import torch_mlu_ops

    working = torch_mlu_ops.flash_attention
    broken = False

    def flash_attention(*arguments: Any, **named: Any) -> Any:
        if broken:
            raise RuntimeError("cnnl: CNNL_STATUS_EXECUTION_FAILED")
        return working(*arguments, **named)

    torch_mlu_ops.flash_attention = flash_attention
    with load() as llm:
        broken = True
        [output] = llm.generate([PROMPTS[0]], PARAMS, use_tqdm=False, on_error="return")
        assert str(output.error) == (
            "computing this request failed: RuntimeError: cnnl: CNNL_STATUS_EXECUTION_FAILED"
        )
        broken = False
        assert llm.generate([PROMPTS[0]], PARAMS, use_tqdm=False)[0].error is None


def test_unknown_arguments_are_refused_and_the_reference_serves() -> None:
    import torch_mlu_ops

    def single_query_cached_kv_attn(q: Any, out: Any, k_cache: Any, v_cache: Any, *others: Any) -> Any:
        raise AssertionError("called with arguments of another meaning")

    torch_mlu_ops.single_query_cached_kv_attn = single_query_cached_kv_attn
    found = probe()
    assert "takes (q, out, k_cache, v_cache); expected one that means block_tables" in found.next_step
    assert found.score == 50
    with load() as llm:
        served = {
            choice.op for choice in llm.engine.executor.kernels.choices if choice.provider == "reference"
        }
        assert served == {"plan_attention", "write_kv", "paged_attention", "top_k"}
        assert llm.generate(PROMPTS, PARAMS, use_tqdm=False)[0].outputs[0].token_ids


def test_a_wrong_switch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSIN_MLU_DECODE_WINDOW", "1")
    assert probe().score == 0
    with pytest.raises(ConfigError, match="OPSIN_MLU_DECODE_WINDOW='1': expected auto, 0 or -1"):
        load()


@pytest.mark.parametrize(
    ("quantization", "group", "used"),
    [("int8", None, "int8"), ("int8", 64, "int8 group 64"), ("int4", 64, "int4 group 64")],
)
def test_fewer_bits(ops: str, quantization: str, group: int | None, used: str) -> None:
    with load(quantization=quantization, quantization_group_size=group) as llm, CARD.recorded() as trace:
        assert llm.generate(PROMPTS, PARAMS, use_tqdm=False)[0].outputs[0].token_ids
        forms = llm.engine.executor.weight_forms
    assert trace["tmo::weight_only_quant_matmul"]
    assert used in forms, forms
    assert not {"float32"} & set(forms)


def test_either_half_of_a_byte_may_come_first() -> None:
    answers = []
    for halves in ("low", "high"):
        with SWITCHES.changed(halves=halves):
            use_ops("1.3.2")
            with load(quantization="int4", quantization_group_size=64) as llm:
                answers.append(
                    [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
                )
                details = llm.engine.executor.weight_forms
            assert "int4 group 64" in details
    assert answers[0] == answers[1]


@pytest.mark.parametrize("switch", ["ROTARY_IN_PLACE", "FUSED_ACTIVATION"])
def test_switches_change_the_way_and_not_the_tokens(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    prompt = {
        "prompt": "<|vision_start|><|image_pad|><|vision_end|>what is it?",
        "multi_modal_data": {"image": picture("cat_150x240.png")},
    }
    answers, traces = [], []
    for value in ("1", "0"):
        monkeypatch.setenv(f"OPSIN_MLU_{switch}", value)
        with load() as llm, CARD.recorded() as trace:
            answers.append(llm.generate(prompt, PARAMS, use_tqdm=False)[0].outputs[0].token_ids)
        traces.append(dict(trace))
    assert answers[0] == answers[1]
    assert traces[0] != traces[1]


def test_attention_computes_in_float32_unless_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_mlu_ops

    asked: list[torch.dtype] = []
    working = torch_mlu_ops.flash_attention

    def flash_attention(*arguments: Any, **named: Any) -> Any:
        asked.append(named["compute_dtype"])
        return working(*arguments, **named)

    torch_mlu_ops.flash_attention = flash_attention
    for value in ("0", "1"):
        monkeypatch.setenv("OPSIN_MLU_HALF_SOFTMAX", value)
        with load() as llm:
            assert llm.generate(PROMPTS, PARAMS, use_tqdm=False)[0].outputs[0].token_ids
    assert list(dict.fromkeys(asked)) == [torch.float32, torch.float16]


def test_head_sizes_can_be_switched(ops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 is filled up to 96 by default; the new generation takes it as it is, the old one is declined."""
    [case] = [c for c in kernel_cases(("float16",)) if c.name == "dense_attention-float16-8x80-uneven"]
    check_kernel(case, open_device(0), opsin_register_kernels())
    monkeypatch.setenv("OPSIN_MLU_HEAD_SIZES", "64,80,128")
    if ops == "1.3.2":
        assert check_kernel(case, open_device(0), opsin_register_kernels()).provider == "reference"
    else:
        assert check_kernel(case, open_device(0), opsin_register_kernels()).provider == "mlu"


def test_the_second_chip_of_an_x8() -> None:
    with CARD.changed(num_devices=2, name="MLU370-X8"):
        before = CARD.allocated[0]
        with load(device="mlu:1") as llm:
            answers = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
            assert CARD.allocated[1] > 0
            assert CARD.allocated[0] == before
            batch = AttentionBatch(
                query_lens=[1], context_lens=[1], block_tables=[[0]], slots=[0], block_size=16, device="mlu:1"
            )
            assert llm.engine.executor.kernels.plan_attention(batch).slots.device == torch.device("mlu", 1)
    with load() as llm:
        wanted = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in answers] == [o.outputs[0].token_ids for o in wanted]
