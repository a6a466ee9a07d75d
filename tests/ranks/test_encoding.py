"""Several pictures are encoded by several ranks, and one that cannot be fails alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from opsin import LLM, SamplingParams
from opsin.api import MappedMedia
from opsin.errors import DeviceLostError, RequestError
from opsin.rank.leader import LeadingRank
from tests.models.golden import GOLDEN

MODEL = str(GOLDEN / "qwen2vl" / "model")
SETTINGS: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 2**23, "limit_mm_per_prompt": {"image": 8}}


def pictures(count: int) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (28 * (2 + i % 3), 56, 3), dtype=np.uint8) for i in range(count)]


def mapped(llm: LLM, count: int) -> list[MappedMedia]:
    text = "<|vision_start|><|image_pad|><|vision_end|>" * count
    prompt = {"prompt": text, "multi_modal_data": {"image": pictures(count)}}
    return [item.mapped for item in llm.engine.frontend.processor.process(prompt).media]


@pytest.fixture(scope="module")
def alone() -> Iterator[LLM]:
    with LLM(MODEL, **SETTINGS) as llm:
        yield llm


@pytest.fixture
def two() -> Iterator[LLM]:
    with LLM(MODEL, tensor_parallel_size=2, tensor_parallel_timeout=5, **SETTINGS) as llm:
        yield llm


def leader(llm: LLM) -> LeadingRank:
    executor = llm.engine.executor
    assert isinstance(executor, LeadingRank)
    return executor


def test_what_ranks_encode_is_what_one_encodes(alone: LLM, two: LLM) -> None:
    items = mapped(alone, 7)
    here: list[int] = []
    encode = leader(two).model.encode

    def counted(modality: Any, given: Any) -> Any:
        here.append(len(given))
        return encode(modality, given)

    leader(two).model.encode = counted  # type: ignore[method-assign]
    found = leader(two).encode("image", items)
    assert 0 < here[0] < 7, "some are encoded elsewhere"
    for one, other in zip(found, alone.engine.executor.encode("image", items), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_an_item_that_cannot_be_encoded_fails_alone(alone: LLM, two: LLM) -> None:
    items = mapped(alone, 4)
    broken = MappedMedia(num_embeds=items[3].num_embeds, tensors={}, geometry=items[3].geometry)
    with pytest.raises((RequestError, KeyError)):
        leader(two).encode("image", [*items[:3], broken])
    again = leader(two).encode("image", items)  # ranks are still in step
    assert [len(rows) for rows in again] == [item.num_embeds for item in items]
    assert two.generate("Hello", SamplingParams(max_tokens=2), use_tqdm=False)


@pytest.mark.parametrize(("act", "told"), [("kill", "SIGKILL"), ("suspend", "says nothing")])
def test_a_rank_that_is_lost_while_it_encodes(alone: LLM, two: LLM, act: str, told: str) -> None:
    items = mapped(alone, 4)
    getattr(psutil.Process(leader(two)._followers[0].process.pid), act)()
    with pytest.raises(DeviceLostError, match=told):
        leader(two).encode("image", items)
    with pytest.raises(DeviceLostError, match=told):
        two.generate("Hello", SamplingParams(max_tokens=2), use_tqdm=False)
