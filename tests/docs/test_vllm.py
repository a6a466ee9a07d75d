"""docs/vllm.md: every row of its tables is what `opsin.vllm_names` says, and what happens."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

import opsin
from opsin import LLM, BeamSearchParams, EngineArgs, PoolingParams, SamplingParams, StructuredOutputsParams
from opsin.config import SpeculativeConfig, engine_settings
from opsin.errors import ConfigError, RequestError
from opsin.inputs.prompt import KEYS, Prompt
from opsin.vllm_names import (
    BEAM_SEARCH,
    CALL,
    ENGINE,
    METHODS,
    POOLING,
    PROMPT,
    SAMPLING,
    SPECULATIVE,
    STRUCTURED,
    Names,
    NoEffect,
    Refused,
    Renamed,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vllm.md").read_text()
MODEL = str(ROOT / "tests/golden/qwen2vl/model")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, dtype="float32", kv_cache_memory=2**20) as loaded:
        yield loaded


def tables(heading: str) -> list[list[tuple[list[str], str, str]]]:
    """The tables of a section, each row as names, what they are here, and the note."""
    _, found, rest = PAGE.partition(f"\n## {heading}\n")
    assert found, heading
    section = rest.split("\n## ")[0]
    return [
        [
            (re.findall(r"`([^`]+)`", names), here.strip(), note.strip())
            for names, here, note in (line.strip("|").split("|") for line in table.strip().splitlines())
        ]
        for table in re.findall(r"\| vLLM \| opsin \| \|\n\|---\|---\|---\|\n((?:\|.*\n?)+)", section)
    ]


def same(table: list[tuple[list[str], str, str]]) -> list[str]:
    return [name for names, here, _ in table if here == "same" for name in names]


def described(names: Names) -> list[tuple[list[str], str, str]]:
    """The rows that a table of names has to have."""
    rows: dict[object, tuple[list[str], str, str]] = {}
    for name, entry in names.items():
        if isinstance(entry, Renamed):
            rows[name] = ([name], f"`{entry.to}`", "")
            continue
        here, note = "no effect", entry.why
        if isinstance(entry, Refused):
            accepted = ", ".join(f"`{value!r}`" for value in (None, *entry.neutral))
            here, note = "refused", f"{note} (accepted: {accepted})"
        rows.setdefault((here, note), ([], here, note))[0].append(name)
    return list(rows.values())


def give(take: Callable[..., Any], name: str, value: Any) -> Any:
    return take(**{name: value})


def take_engine(**arguments: Any) -> Any:
    made = EngineArgs(model="m", **arguments)
    assert engine_settings("LLM", {"model": "m", **arguments}) == engine_settings(
        "EngineArgs", {"model": "m", **arguments}
    )
    return asdict(made)


def take_speculative(**arguments: Any) -> Any:
    return SpeculativeConfig.from_dict({"method": "ngram", "num_speculative_tokens": 4, **arguments})


def take_structured(**arguments: Any) -> Any:
    return StructuredOutputsParams(regex="a", **arguments)


def take_beam(**arguments: Any) -> Any:
    return BeamSearchParams(2, **arguments)


def take_prompt(**arguments: Any) -> Any:
    return Prompt.parse({"prompt": "a", **arguments})


TABLES: list[tuple[str, int, Names, Callable[..., Any]]] = [
    ("`LLM` and `EngineArgs`", 0, ENGINE, take_engine),
    ("`speculative_config`", 0, SPECULATIVE, take_speculative),
    ("`SamplingParams`", 0, SAMPLING, SamplingParams),
    ("`StructuredOutputsParams`, `GuidedDecodingParams`", 0, STRUCTURED, take_structured),
    ("`PoolingParams`", 0, POOLING, PoolingParams),
    ("`BeamSearchParams`", 0, BEAM_SEARCH, take_beam),
    ("A prompt's dict", 0, PROMPT, take_prompt),
    ("Methods of `LLM`", 1, CALL, lambda **arguments: arguments),
]


@pytest.mark.parametrize(("heading", "number", "names", "take"), TABLES, ids=lambda value: str(value)[:20])
def test_tables_list_all_names(heading: str, number: int, names: Names, take: Callable[..., Any]) -> None:
    table = tables(heading)[number]
    assert [row for row in table if row[1] != "same"] == described(names)
    listed = [name for row in table for name in row[0]]
    assert len(set(listed)) == len(listed)


VALUES = {"kv_cache_memory_bytes": 5, "mm_processor_cache_gb": 0.25, "disable_mm_preprocessor_cache": True}


@pytest.mark.parametrize(
    ("take", "name", "entry"),
    [(take, name, entry) for _, _, names, take in TABLES[:-1] for name, entry in names.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_of_arguments(take: Callable[..., Any], name: str, entry: Any) -> None:
    plain = take()
    assert give(take, name, None) == plain
    if isinstance(entry, NoEffect):
        for value in (True, 7, "anything", {"a": 1}, object()):
            assert give(take, name, value) == plain
    elif isinstance(entry, Refused):
        for value in entry.neutral:
            assert give(take, name, value) == plain
        for value in (-7, "something else", [7]):
            with pytest.raises(
                (ConfigError, RequestError), match=re.escape(f"{name}={value!r} is not supported: ")
            ):
                give(take, name, value)
        with pytest.raises((ConfigError, RequestError), match=re.escape(entry.why)):
            give(take, name, "something else")
    else:
        wanted = VALUES.get(name, StructuredOutputsParams(regex="a"))
        found = give(take, name, wanted)
        value = found[entry.to] if isinstance(found, dict) else getattr(found, entry.to)
        assert value == entry.convert(wanted)
        with pytest.raises(ConfigError, match=f"{name} is another name of {entry.to}"):
            take(**{name: wanted, entry.to: entry.convert(wanted) or 1})


@pytest.mark.parametrize(
    ("heading", "cls"),
    [
        ("`SamplingParams`", SamplingParams),
        ("`StructuredOutputsParams`, `GuidedDecodingParams`", StructuredOutputsParams),
        ("`PoolingParams`", PoolingParams),
        ("`BeamSearchParams`", BeamSearchParams),
        ("`LLM` and `EngineArgs`", EngineArgs),
        ("`speculative_config`", SpeculativeConfig),
    ],
)
def test_same_fields(heading: str, cls: Any) -> None:
    names = set(same(tables(heading)[0]))
    own = {field.name for field in fields(cls)}
    assert names - {"clone"} <= own
    if cls is BeamSearchParams:
        assert own - names == {"logprobs"}, "opsin's own"
    if cls in (PoolingParams, StructuredOutputsParams, SpeculativeConfig):
        assert names == own, "all are there"
    if cls is SamplingParams:
        assert own - names == {"structured", "priority"}, "opsin's own"


def test_keys_of_a_prompt() -> None:
    assert sorted(same(tables("A prompt's dict")[0])) == sorted(KEYS)


def test_names_to_import() -> None:
    table = tables("Names to import")[0]
    for name in same(table):
        assert name in opsin.__all__
        assert getattr(opsin, name) is not None
    for names, here, _ in table:
        if here != "same":
            assert not any(hasattr(opsin, name) for name in names)
            for other in re.findall(r"`([^`]+)`", here):
                assert other in opsin.__all__


def test_methods(llm: LLM) -> None:
    methods, arguments = tables("Methods of `LLM`")
    for name in same(methods):
        assert callable(getattr(llm, name))
    refused = {name: note for names, here, note in methods if here == "no" for name in names}
    assert refused == dict(METHODS)
    for name, why in METHODS.items():
        with pytest.raises(AttributeError, match=re.escape(f"LLM.{name} is not in opsin: {why}")):
            getattr(llm, name)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        llm.no_such_thing  # noqa: B018
    signatures = [inspect.signature(getattr(LLM, name)) for name in same(methods)]
    taken = {name for signature in signatures for name in signature.parameters}
    assert set(same(arguments)) <= taken


CALLS: dict[str, Any] = {
    "generate": lambda llm, **more: llm.generate("a", SamplingParams(max_tokens=1), use_tqdm=False, **more),
    "chat": lambda llm, **more: llm.chat(
        [{"role": "user", "content": "a"}], SamplingParams(max_tokens=1), use_tqdm=False, **more
    ),
    "embed": lambda llm, **more: llm.embed("a", use_tqdm=False, **more),
    "score": lambda llm, **more: llm.score("a", "b", use_tqdm=False, **more),
    "beam_search": lambda llm, **more: llm.beam_search("a", BeamSearchParams(2, max_tokens=1), **more),
}


@pytest.mark.parametrize("method", CALLS)
def test_arguments_of_methods(llm: LLM, method: str) -> None:
    for name, entry in CALL.items():
        assert isinstance(entry, Refused)
        for value in (None, *entry.neutral):
            assert len(CALLS[method](llm, **{name: value})) == 1
        with pytest.raises(
            ConfigError, match=re.escape(f"LLM.{method}: {name}='x' is not supported: {entry.why}")
        ):
            CALLS[method](llm, **{name: "x"})
    with pytest.raises(ConfigError, match=f"LLM.{method}: unknown 'lora'"):
        CALLS[method](llm, lora=1)


def test_outputs(llm: LLM) -> None:
    [answer] = CALLS["generate"](llm)
    [embedding] = CALLS["embed"](llm)
    [score] = CALLS["score"](llm)
    made = {type(output).__name__: output for output in (answer, answer.outputs[0], embedding, score)}
    for names, here, _ in tables("Outputs")[0]:
        for name in names:
            cls, attribute = name.split(".")
            assert hasattr(made[cls], attribute) == (here == "same"), name


def test_llm_takes_what_it_says() -> None:
    """As the examples of vLLM call it."""
    arguments = EngineArgs(
        model=MODEL,
        max_model_len=512,
        max_num_seqs=2,
        mm_processor_kwargs={"min_pixels": 784, "max_pixels": 100352},
        limit_mm_per_prompt={"image": 1},
        tensor_parallel_size=1,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
        kv_cache_memory_bytes=2**20,
    )
    with LLM(**asdict(arguments) | {"seed": 0, "disable_log_stats": True}) as loaded:
        sampling_params = SamplingParams(temperature=0.2, max_tokens=64, stop_token_ids=None)
        sampling_params.max_tokens = 3
        outputs = loaded.generate(
            [{"prompt": "Hello", "multi_modal_data": {}, "multi_modal_uuids": {}}],
            sampling_params=sampling_params,
            lora_request=None,
            use_tqdm=False,
        )
        for output in outputs:
            assert len(output.outputs[0].token_ids) <= 3
            assert output.outputs[0].finished()
    with pytest.raises(
        ConfigError, match=r"LLM: pipeline_parallel_size=2 is not supported: tensor_parallel_size divides"
    ):
        LLM(MODEL, pipeline_parallel_size=2)
