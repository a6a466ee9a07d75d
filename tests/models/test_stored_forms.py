"""Quantised checkpoints answer as the same rounded weights do that are stored as floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opsin import LLM, SamplingParams
from opsin.errors import CheckpointError, ConfigError, MissingPluginError
from opsin.plugins import load_plugins
from tests.models.families import FAMILIES
from tests.models.golden import cases, recorded_logits
from tests.models.stored_forms import LAYOUTS, write

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=0)
OFTEN = ("minicpmv26", "phi3v", "qwen2vl", "qwen3vl")
"""Separate, fused and renamed projections, and norms between; `make test-full` runs all families."""

SETTINGS: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 2**24}


def answers(
    folder: Path, family: str, **settings: Any
) -> tuple[list[Any], list[torch.Tensor], dict[str, int]]:
    """Tokens, log-probabilities of every step and of prompts, and the forms in use."""
    prompts = [case.prompt() for case in cases(family)[:3]]
    with LLM(str(folder), **{**SETTINGS, **settings}) as llm, recorded_logits(llm) as logits:
        outputs = [llm.generate(prompt, PARAMS, use_tqdm=False)[0] for prompt in prompts]
        forms = dict(llm.engine.stats().weight_forms)
    numbers = [step.log_softmax(-1) for step in logits]
    for output in outputs:
        assert output.prompt_logprobs is not None
        pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:])
        numbers.append(torch.tensor([entry[token].logprob for entry, token in pairs if entry is not None]))
    return [output.outputs[0].token_ids for output in outputs], numbers, forms


def compare(
    one: tuple[list[Any], list[torch.Tensor], Any], other: tuple[list[Any], list[torch.Tensor], Any]
) -> None:
    assert one[0] == other[0]
    assert max(float((a - b).abs().max()) for a, b in zip(one[1], other[1], strict=True)) < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "family",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES)],
)
def test_stored_integers_are_the_same_weights_as_floats(tmp_path: Path, family: str, layout: str) -> None:
    count = write(family, LAYOUTS[layout], tmp_path / "stored", tmp_path / "floats")
    assert count >= 2
    stored = answers(tmp_path / "stored", family)
    compare(stored, answers(tmp_path / "floats", family))
    if "fp8" not in layout and "float" not in layout:
        assert any(form.startswith(("int", "table")) for form in stored[2]), stored[2]


@pytest.mark.parametrize("layout", ["gptq 4 act-order asymmetric", "nf4 nested", "int-quantized"])
def test_none_makes_floats_of_them(tmp_path: Path, layout: str) -> None:
    write("qwen2vl", LAYOUTS[layout], tmp_path / "stored", tmp_path / "floats")
    plain = answers(tmp_path / "stored", "qwen2vl", quantization="none")
    assert not any(form.startswith(("int", "table")) for form in plain[2])
    compare(plain, answers(tmp_path / "floats", "qwen2vl"))


@pytest.mark.parametrize("layout", ["gptq 4", "awq", "pack-quantized 4 asymmetric", "int-quantized", "nf4"])
def test_batches_and_chunks_change_nothing(tmp_path: Path, layout: str) -> None:
    write("qwen2vl", LAYOUTS[layout], tmp_path / "stored", tmp_path / "floats")
    check_invariance(tmp_path / "stored", quantization="auto")


def check_invariance(folder: Path, **settings: Any) -> None:
    prompts = [case.prompt() for case in cases("qwen2vl")]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(str(folder), **SETTINGS, **settings) as llm:
        alone = [llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
        together = [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
    with LLM(
        str(folder), **SETTINGS, **settings, max_num_batched_tokens=24, enable_prefix_caching=False
    ) as llm:
        chunked = [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
    assert together == alone
    assert chunked == alone


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_rounding_at_load_depends_on_no_neighbour(bits: str) -> None:
    from tests.models.golden import GOLDEN

    check_invariance(GOLDEN / "qwen2vl" / "model", quantization=bits)


def test_without_its_plugin_a_layout_names_the_package(tmp_path: Path) -> None:
    write("qwen2vl", LAYOUTS["awq"], tmp_path / "stored", tmp_path / "floats")
    plugins = load_plugins(deny=["weight_formats"])
    with pytest.raises(MissingPluginError, match="opsin-weight-formats"):
        LLM(str(tmp_path / "stored"), plugins=plugins, **SETTINGS)


def test_a_method_must_be_the_stored_one(tmp_path: Path) -> None:
    write("qwen2vl", LAYOUTS["awq"], tmp_path / "stored", tmp_path / "floats")
    with pytest.raises(ConfigError, match="is quantised by 'awq'"):
        LLM(str(tmp_path / "stored"), quantization="gptq", **SETTINGS)
    with pytest.raises(ConfigError, match="is not quantised"):
        LLM(str(tmp_path / "floats"), quantization="awq_marlin", **SETTINGS)


def test_a_checkpoint_of_floats_that_says_otherwise_is_no_quantised_one(tmp_path: Path) -> None:
    write("qwen2vl", LAYOUTS["awq"], tmp_path / "stored", tmp_path / "floats")
    (tmp_path / "floats" / "config.json").write_text((tmp_path / "stored" / "config.json").read_text())
    with pytest.raises(CheckpointError, match='quantization="none"'):
        LLM(str(tmp_path / "floats"), **SETTINGS)
    answers(tmp_path / "floats", "qwen2vl", quantization="none")


@pytest.mark.parametrize(
    ("layout", "name", "change", "message"),
    [
        ("gptq 4", "scales", lambda t: t[:, :-1], "scales are"),
        ("gptq 4", "qweight", lambda t: t.to(torch.int64), "int32"),
        ("gptq 4", "scales", None, "scales is missing"),
        ("awq", "qzeros", lambda t: t[:-1], "zero points are"),
        ("pack-quantized 4", "weight_packed", lambda t: t[:, :-1], "expected 4 or 8 bits"),
        ("pack-quantized 4", "weight_shape", None, "weight_shape is missing"),
        ("nf4", "weight.absmax", lambda t: t[:-1], "scales for"),
        ("llm.int8", "SCB", lambda t: t[:-1], "SCB"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, layout: str, name: str, change: Any, message: str
) -> None:
    from safetensors.torch import load_file, save_file

    write("qwen2vl", LAYOUTS[layout], tmp_path / "stored", tmp_path / "floats")
    file = tmp_path / "stored" / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in sorted(tensors) if key.endswith(f".{name}"))
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"(?s){key.removesuffix('.' + name)}.*{message}"):
        LLM(str(tmp_path / "stored"), **SETTINGS)
