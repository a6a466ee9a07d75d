"""Settings are checked when they are made, and resolved by a pure function."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin import LLM, GuidedDecodingParams, StructuredOutputsParams
from opsin.api import Capabilities
from opsin.config import EngineArgs, EngineConfig
from opsin.errors import ConfigError, OpsinError
from opsin.params import BeamSearchParams, PoolingParams, SamplingParams, StructuredOutput
from opsin.rank.sizing import resolve, resolve_dtype

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = Capabilities(dtypes=("float32", "bfloat16"), dtype_for={"float16": "float32"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"min_p": 2.0},
        {"seed": 2**63},
        {"stop": ["fine", ""]},
        {"max_tokens": 0},
        {"min_tokens": 5, "max_tokens": 4},
        {"presence_penalty": 3.0},
        {"frequency_penalty": -3.0},
        {"repetition_penalty": 0.0},
        {"logit_bias": {5: 101.0}},
        {"logprobs": 21},
        {"prompt_logprobs": -2},
    ],
    ids=str,
)
def test_impossible_sampling_parameters_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_sampling_parameters_are_normalised() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1], top_k=-1, logit_bias={"7": 1})  # type: ignore[dict-item]
    assert params.stop_strings == ("end",)
    assert params.stop_token_ids == (1,)
    assert params.top_k == 0
    assert params.logit_bias == {7: 1.0}


def test_where_sampling_has_its_defaults(tmp_path: Path) -> None:
    model = str(GOLDEN / "qwen2vl" / "model")

    def sampled(**settings: Any) -> SamplingParams:
        with LLM(model, kv_cache_memory=2**22, **settings) as llm:
            return llm.get_default_sampling_params()

    own = sampled()
    assert (own.top_k, own.temperature) == (1, 0.01)
    assert sampled(generation_config="vllm") == SamplingParams()
    changed = sampled(override_generation_config={"temperature": 0.3, "top_k": 7})
    assert (changed.temperature, changed.top_k, changed.top_p) == (0.3, 7, own.top_p)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.9, "max_new_tokens": 5}')
    other = sampled(generation_config=str(tmp_path), override_generation_config={"min_p": 0.1})
    assert other == SamplingParams(temperature=0.9, max_tokens=5, min_p=0.1)
    for wrong, says in {
        "generation_config": ("nowhere", "expected auto, vllm, or a folder"),
        "override_generation_config": ({"temprature": 1}, "did you mean 'temperature'"),
    }.items():
        with pytest.raises(OpsinError, match=says[1]):
            sampled(**{wrong: says[0]})
    with pytest.raises(OpsinError, match="top_p"):
        sampled(override_generation_config={"top_p": 7})


def test_generation_config_gives_defaults_that_changes_override() -> None:
    defaults = {"do_sample": True, "temperature": 0.01, "top_k": 1, "eos_token_id": 3, "top_p": None}
    params = SamplingParams.from_generation_config(defaults, max_tokens=7)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.01, 1, 1.0, 7)
    assert SamplingParams.from_generation_config({"do_sample": False, "temperature": 0.7}).temperature == 0
    assert SamplingParams.from_generation_config(defaults, temperature=0.5).temperature == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: BeamSearchParams(beam_width=0),
        lambda: BeamSearchParams(beam_width=2, max_tokens=0),
        lambda: PoolingParams(dimensions=0),
        lambda: EngineConfig(model="m", max_num_seqs=0),
        lambda: EngineConfig(model="m", kv_cache_memory=0),
        lambda: EngineConfig(model="m", limit_mm_per_prompt={"image": -1}),
        lambda: EngineConfig(model="m", limit_mm_per_prompt={"image": {"width": 5}}),
        lambda: EngineConfig(model="m", limit_mm_per_prompt="image=2"),  # type: ignore[arg-type]
        lambda: EngineConfig(model="m", mm_processor_kwargs=[1]),  # type: ignore[arg-type]
        lambda: EngineConfig(model="m", task="classify"),  # type: ignore[arg-type]
        lambda: EngineConfig(model="m", runner="draft"),  # type: ignore[arg-type]
        lambda: EngineConfig(model="m", dtype=torch.float64),  # type: ignore[arg-type]
        lambda: EngineConfig(model="m", load_format="pt"),  # type: ignore[arg-type]
        lambda: EngineConfig(model="m", pooling_type="max"),  # type: ignore[arg-type]
        lambda: EngineConfig(model="m", chat_template_content_format="text"),  # type: ignore[arg-type]
        lambda: EngineConfig(model="m", scheduling_policy="lifo"),  # type: ignore[arg-type]
        lambda: EngineConfig(model="m", max_model_len="many"),  # type: ignore[arg-type]
    ],
)
def test_other_impossible_settings_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make()


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ({}, "task", "generate"),
        ({"task": "auto"}, "task", "generate"),
        ({"task": "embedding"}, "task", "embed"),
        ({"runner": "pooling"}, "task", "embed"),
        ({"runner": "pooling", "task": "embed"}, "task", "embed"),
        ({"dtype": "half"}, "dtype", "float16"),
        ({"dtype": "float"}, "dtype", "float32"),
        ({"dtype": torch.float32}, "dtype", "float32"),
        ({"dtype": torch.bfloat16}, "dtype", "bfloat16"),
        ({"limit_mm_per_prompt": {"image": {"count": 2, "width": 512}}}, "limit_mm_per_prompt", {"image": 2}),
        ({"mm_processor_kwargs": None}, "mm_processor_kwargs", {}),
    ],
    ids=str,
)
def test_other_spellings_of_settings(given: dict[str, Any], field: str, expected: Any) -> None:
    config = EngineConfig(model="m", load_format="auto", trust_remote_code=True, **given)
    assert getattr(config, field) == expected
    assert dataclasses.replace(config) == config


def test_task_and_runner_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="task='generate' and runner='pooling' contradict each other"):
        EngineConfig(model="m", task="generate", runner="pooling")


def test_what_is_wrong_and_what_would_be_right() -> None:
    with pytest.raises(ConfigError, match=r"scheduling_policy='lifo': expected 'fcfs', 'priority'"):
        EngineConfig(model="m", scheduling_policy="lifo")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_model_len=0: expected an integer, at least 1 or None"):
        EngineConfig(model="m", max_model_len=0)


def test_auto_dtype_is_what_the_device_prefers() -> None:
    assert resolve_dtype("auto", "bfloat16", CPU) == "bfloat16"
    assert resolve_dtype("auto", "float16", CPU) == "float32"
    advice = dataclasses.replace(CPU, dtypes=("float16",), advice={"bfloat16": 'pass dtype="float16"'})
    with pytest.raises(ConfigError, match='pass dtype="float16"'):
        resolve_dtype("bfloat16", "bfloat16", advice)
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        resolve_dtype("float16", "float32", CPU)


def size(
    free: int = 2**30,
    model_max_len: int = 4096,
    per_token: int = 1024,
    capabilities: Capabilities = CPU,
    **settings: Any,
) -> Any:
    return resolve(
        EngineConfig(model="m", **settings),
        capabilities,
        dtype="float32",
        model_max_len=model_max_len,
        kv_bytes_per_token=per_token,
        kv_row_elements=64,
        free_bytes=free,
    )


def test_the_context_is_cut_to_what_fits_unless_it_was_asked_for() -> None:
    assert size(kv_cache_memory=1024 * 160).max_model_len == 160
    with pytest.raises(ConfigError, match="max_model_len=160"):
        size(kv_cache_memory=1024 * 160, max_model_len=1000)
    with pytest.raises(ConfigError, match="4096"):
        size(max_model_len=5000)
    with pytest.raises(ConfigError, match="no block"):
        size(kv_cache_memory=1024)


def test_no_more_is_taken_than_can_be_used() -> None:
    resolved = size(free=2**40, max_num_seqs=2, model_max_len=64)
    assert resolved.num_blocks * resolved.block_size <= 2 * (64 + 16)


def test_a_device_with_its_own_memory_says_how_much_of_it_the_cache_takes() -> None:
    own = dataclasses.replace(CPU, kv_memory_share=0.75)
    resolved = size(free=2**30, capabilities=own, model_max_len=2**20)
    assert resolved.num_blocks * resolved.block_size * 1024 == 0.75 * 2**30


def test_no_cache_tensor_is_larger_than_the_device_takes() -> None:
    narrow = dataclasses.replace(CPU, max_tensor_elements=64 * 16 * 10 + 5)
    assert size(capabilities=narrow).num_blocks == 10


@given(
    free=st.integers(2**20, 2**36),
    length=st.integers(16, 131072),
    per_token=st.integers(64, 2**20),
    seqs=st.integers(1, 256),
)
def test_a_lone_sequence_always_fits(free: int, length: int, per_token: int, seqs: int) -> None:
    try:
        resolved = size(free=free, model_max_len=length, per_token=per_token, max_num_seqs=seqs)
    except ConfigError as error:
        assert "no block" in str(error)  # noqa: PT017
        return
    assert resolved.max_model_len <= resolved.num_blocks * resolved.block_size
    assert resolved.num_blocks * resolved.block_size * per_token <= max(free, 1)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"max_tokens": 2.5}, "max_tokens=2.5: expected an integer, at least 1 or None"),
        ({"n": True}, "n=True: expected an integer, at least 1"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids=('a',): expected a list, each an integer or None"),
        ({"stop_token_ids": 0}, "stop_token_ids=0: expected a list or None"),
        ({"logit_bias": False}, "logit_bias=False: expected a mapping"),
        ({"bad_words": 0}, "bad_words=0: expected a list"),
        ({"stop_token_ids": 5}, "stop_token_ids=5: expected a list or None"),
        ({"temperature": None}, "temperature=None: expected a number, at least 0"),
        ({"temperature": "0.5"}, "temperature='0.5': expected a number, at least 0"),
        ({"temperature": float("inf")}, "temperature=inf: expected a number"),
        ({"stop": 3}, "stop=3: expected a string or a list"),
        ({"stop": [1]}, "stop=(1,): expected a string or a list, each a string"),
        ({"ignore_eos": 1}, "ignore_eos=1: expected true or false"),
        ({"seed": 1.0}, "seed=1.0: expected an integer"),
        ({"logit_bias": {"a": 1}}, "logit_bias={'a': 1}: expected a mapping, its keys an integer"),
        ({"logit_bias": {1: "a"}}, "logit_bias={1: 'a'}: expected a mapping, its values a number"),
        ({"structured": {"regex": "a"}}, "structured={'regex': 'a'}: expected"),
        ({"bad_words": "a"}, "bad_words='a': expected a list"),
        ({"bad_words": [" "]}, "bad_words=(' ',): expected non-empty strings"),
        ({"logits_processors": [1]}, "logits_processors=(1,): expected a list, each a function"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens=0: expected at least 1, or -1"),
        ({"output_kind": 1}, "output_kind=1: expected"),
        ({"stop": "a", "detokenize": False}, "stop=('a',): expected none with detokenize=False"),
        ({"temprature": 1}, "unknown 'temprature' (did you mean 'temperature'?)"),
        ({"best_of": 2}, "best_of=2 is not supported: ask for n samples"),
        (
            {"structured_outputs": StructuredOutput(regex="a"), "structured": StructuredOutput(regex="b")},
            "pass one",
        ),
    ],
    ids=str,
)
def test_types_of_sampling_parameters_are_checked(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        SamplingParams(**wrong)
    params = SamplingParams()
    if len(wrong) == 1 and next(iter(wrong)) in vars(params):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            setattr(params, *next(iter(wrong.items())))
        assert params == SamplingParams()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: PoolingParams(dimensions=2.0), "dimensions=2.0: expected an integer"),  # type: ignore[arg-type]
        (lambda: PoolingParams(truncate_prompt_tokens=0), "truncate_prompt_tokens=0"),
        (lambda: PoolingParams(normalize=True), "pass normalize= to LLM"),  # type: ignore[call-arg]
        (lambda: BeamSearchParams(beam_width="2"), "beam_width='2': expected an integer"),  # type: ignore[arg-type]
        (lambda: BeamSearchParams(2, temperature=0.5), "temperature=0.5 is not supported"),  # type: ignore[call-arg]
        (lambda: EngineConfig(model=5), "model=5: expected a string"),  # type: ignore[arg-type]
        (lambda: EngineConfig(model="m", seed="1"), "seed='1': expected an integer or None"),  # type: ignore[arg-type]
        (lambda: EngineConfig(model="m", max_num_seqs=4.5), "expected an integer, at least 1"),  # type: ignore[arg-type]
        (lambda: EngineConfig(model="m", enable_prefix_caching="no"), "expected true or false"),  # type: ignore[arg-type]
        (
            lambda: EngineConfig(model="m", limit_mm_per_prompt={"image": 1.5}),
            "['image']=1.5: expected an integer",
        ),  # type: ignore[dict-item]
        (lambda: EngineArgs(model="m", pipeline_parallel_size=2), "tensor_parallel_size divides"),
    ],
)
def test_types_of_other_settings_are_checked(make: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        make()


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(
        n=np.int64(2),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        stop_token_ids=np.array([1, 2]),  # type: ignore[arg-type]
        ignore_eos=np.bool_(True),  # type: ignore[arg-type]
        max_tokens=torch.tensor(7),  # type: ignore[arg-type]
    )
    assert params == SamplingParams(
        n=2, temperature=0.5, stop_token_ids=[1, 2], ignore_eos=True, max_tokens=7
    )
    assert [type(value) for value in (params.n, params.temperature, params.ignore_eos)] == [int, float, bool]
    with pytest.raises(ConfigError, match="max_tokens"):
        SamplingParams(max_tokens=np.float64(2))  # type: ignore[arg-type]
    assert EngineConfig(model=Path("a/b"), max_num_seqs=np.int32(3)).model == "a/b"  # type: ignore[arg-type]


def test_sampling_parameters_may_be_assigned() -> None:
    params = SamplingParams(temperature=0)
    copied = params.clone()
    params.max_tokens = 5
    params.stop = "end"
    params.top_k = -1
    params.structured_outputs = StructuredOutput(regex="a")  # type: ignore[attr-defined]
    assert params == SamplingParams(
        temperature=0, max_tokens=5, stop=["end"], structured=StructuredOutput(regex="a")
    )
    assert copied == SamplingParams(temperature=0)
    assert dataclasses.replace(params, n=2).max_tokens == 5
    assert pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(ConfigError, match="unknown 'max_token'"):
        params.max_token = 5  # type: ignore[attr-defined]


def test_constraints_under_vllms_names() -> None:
    wanted = StructuredOutputsParams(json={"type": "object"}, backend="xgrammar")
    for name in ("structured_outputs", "guided_decoding"):
        assert SamplingParams(**{name: wanted}).structured == GuidedDecodingParams(json={"type": "object"})
        assert SamplingParams(**{name: None}).structured is None


def test_engine_args_are_arguments_of_llm() -> None:
    args = EngineArgs(
        model="m",
        tensor_parallel_size=1,
        gpu_memory_utilization=0.9,
        limit_mm_per_prompt={"image": 2},
        kv_cache_memory_bytes=2**30,
        mm_processor_cache_gb=0.5,
        max_num_seqs=None,
        enable_prefix_caching=None,
    )
    plain = EngineConfig(
        model="m",
        limit_mm_per_prompt={"image": 2},
        kv_cache_memory=2**30,
        media_cache_memory=2**29,
        local_media=True,
    )
    assert dataclasses.asdict(args) == dataclasses.asdict(plain)


def test_a_misspelt_name_of_vllm_is_recognised() -> None:
    with pytest.raises(ConfigError, match="unknown 'tensor_paralel_size'.*mean 'tensor_parallel_size'"):
        EngineArgs(model="m", tensor_paralel_size=1)


def test_a_default_gives_way_to_vllms_name_for_the_field() -> None:
    every_field = dataclasses.asdict(EngineArgs(model="m"))
    assert EngineArgs(**every_field, mm_processor_cache_gb=0).media_cache_memory == 0
    assert EngineArgs(**every_field | {"media_cache_memory": 5}).media_cache_memory == 5
    with pytest.raises(ConfigError, match="mm_processor_cache_gb is another name of media_cache_memory"):
        EngineArgs(model="m", mm_processor_cache_gb=1, media_cache_memory=5)
