"""How a request is computed must not show in what it gives: token for token, over every family."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from opsin import LLM, SamplingParams
from opsin.errors import MediaError, PromptTooLongError, RequestError, RequestsFailed
from tests.models.families import FAMILIES, encoded
from tests.models.golden import GOLDEN, picture

WORDS = [
    "the",
    "picture",
    "shows",
    "a",
    "cup",
    "of",
    "coffee",
    "and",
    "two",
    "cats",
    "on",
    "the",
    "table",
    "near",
    "a",
    "rocket",
]
PICTURES = ["coffee_320x213.png", "cat_150x240.png", "astronaut_96x96.png", "rocket_400x80.png"]


def load(family: str, **settings: Any) -> LLM:
    """The family's tiny checkpoint."""
    settings = {"dtype": "float32", "kv_cache_memory": 2**24, **settings}
    return LLM(str(GOLDEN / family / "model"), **settings)


@lru_cache
def requests(family: str, count: int, seed: int = 0) -> tuple[tuple[dict[str, Any], SamplingParams], ...]:
    """Mixed requests: text only, one and several pictures, of different lengths, some repeated pictures."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        names = [chance.choice(PICTURES) for _ in range(chance.choice([0, 1, 1, 2]))]
        marks = "".join(FAMILIES[family].image_text(n + 1) for n in range(len(names)))
        words = " ".join(chance.choice(WORDS) for _ in range(chance.randint(3, 40)))
        prompt: dict[str, Any] = {"prompt": f"{marks}\n{words}"}
        if names:
            prompt["multi_modal_data"] = {"image": [picture(name) for name in names]}
        params = SamplingParams(temperature=0, max_tokens=chance.randint(4, 24), ignore_eos=True)
        found.append((prompt, params))
    return tuple(found)


def tokens(llm: LLM, batch: tuple[tuple[dict[str, Any], SamplingParams], ...]) -> list[list[int]]:
    """Answers to a batch, as token ids."""
    outputs = llm.generate([prompt for prompt, _ in batch], [params for _, params in batch], use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def llm(family: str) -> Iterator[LLM]:
    with load(family) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(llm: LLM, family: str) -> list[list[int]]:
    """32 mixed requests, one by one and without a prefix cache: the plainest way."""
    with load(family, enable_prefix_caching=False) as plain:
        return [tokens(plain, (one,))[0] for one in requests(family, 32)]


def test_batched_is_one_by_one(llm: LLM, family: str, expected: list[list[int]]) -> None:
    assert tokens(llm, requests(family, 32)) == expected


@pytest.mark.parametrize("chunk", [1, 7, 16, 50])
def test_any_chunk_size_is_whole_prefill(family: str, expected: list[list[int]], chunk: int) -> None:
    count = 6 if chunk == 1 else 32
    with load(family, max_num_batched_tokens=chunk) as chunked:
        assert tokens(chunked, requests(family, count)) == expected[:count]


def test_prefix_cache_changes_nothing(llm: LLM, family: str, expected: list[list[int]]) -> None:
    tokens(llm, requests(family, 32))
    before = llm.engine.stats()
    assert tokens(llm, requests(family, 32)) == expected
    assert llm.engine.stats().prefix_hits > before.prefix_hits
    assert llm.engine.stats().num_encoded <= before.num_encoded + len(PICTURES)


def test_preemption_changes_nothing(family: str, expected: list[list[int]]) -> None:
    with load(family, **_too_little_cache(family)) as tight:
        assert tokens(tight, requests(family, 32)) == expected
        assert tight.engine.stats().num_preemptions > 0, "this load was meant to be too much"


def test_preemption_loses_no_log_probability_of_a_prompt(family: str) -> None:
    asked = [(prompt, replace(params, prompt_logprobs=0)) for prompt, params in requests(family, 32)]

    def told(llm: LLM) -> list[list[float]]:
        outputs = llm.generate([p for p, _ in asked], [params for _, params in asked], use_tqdm=False)
        found = []
        for output in outputs:
            assert output.prompt_logprobs is not None
            places = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            found.append([place[token].logprob for place, token in places if place is not None])
            assert len(found[-1]) == len(output.prompt_token_ids) - 1
        return found

    with load(family) as roomy:
        expected = told(roomy)
    with load(family, **_too_little_cache(family)) as tight:
        found = told(tight)
        assert tight.engine.stats().num_preemptions > 0, "this load was meant to be too much"
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def _too_little_cache(family: str) -> dict[str, int]:
    """Settings with which 32 requests push each other out of the KV cache."""
    with load(family) as roomy:
        per_block = roomy.engine.resolved.block_size * _bytes_per_token(roomy)
        longest = max(
            len(roomy.engine.frontend.processor.process(prompt).token_ids) + (params.max_tokens or 0)
            for prompt, params in requests(family, 32)
        )
    return {"kv_cache_memory": (longest // 16 + 6) * per_block, "max_model_len": longest + 1}


def _bytes_per_token(llm: LLM) -> int:
    shape = llm.engine.executor.model.kv_geometry
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * 4


def test_a_small_encoder_cache_changes_nothing(family: str, expected: list[list[int]]) -> None:
    with load(family, encoder_cache_memory=1, max_encoder_tokens=1) as tight:
        assert tokens(tight, requests(family, 32)) == expected


@pytest.mark.parametrize("count", [1, 3])
def test_embeddings_as_input_are_pixels(llm: LLM, family: str, count: int) -> None:
    kind = FAMILIES[family]
    marks = "".join(kind.image_text(n + 1) for n in range(count))
    prompt = {
        "prompt": f"{marks} which one?",
        "multi_modal_data": {"image": [picture(name) for name in PICTURES[:count]]},
    }
    processed = llm.engine.frontend.processor.process(prompt)
    embeds = encoded(llm, processed)
    geometries = [item.mapped.geometry for item in processed.media]
    ready = {**prompt, "multi_modal_data": {"image": kind.embeds_input(embeds, geometries)}}
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    pixels, embedded = llm.generate([prompt, ready], params, use_tqdm=False)
    assert embedded.prompt_token_ids == pixels.prompt_token_ids
    assert embedded.outputs[0].token_ids == pixels.outputs[0].token_ids
    [again] = llm.generate(ready, params, use_tqdm=False)
    assert again.metrics.num_cached_tokens > 0, "embeddings take part in the prefix cache"


def test_swapped_pictures_swap_the_answers(llm: LLM, family: str) -> None:
    kind = FAMILIES[family]
    # Random weights may say the same of two pictures, but not with the same confidence.
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0)

    def ask(*names: str) -> tuple[list[int], list[float]]:
        marks = "".join(kind.image_text(n + 1) for n in range(len(names)))
        data = {"prompt": f"{marks} and?", "multi_modal_data": {"image": [picture(name) for name in names]}}
        answer = llm.generate(data, params, use_tqdm=False)[0].outputs[0]
        assert answer.logprobs is not None
        return answer.token_ids, [entry[i].logprob for entry, i in zip(answer.logprobs, answer.token_ids)]

    first, swapped, again = (ask(*order) for order in (PICTURES[:2], PICTURES[1::-1], PICTURES[:2]))
    assert first[0] != swapped[0] or first[1] != pytest.approx(swapped[1], abs=1e-2)
    assert first[0] == again[0]
    assert first[1] == pytest.approx(again[1], abs=1e-4)


def test_one_seed_gives_the_same_samples_in_any_company(llm: LLM, family: str) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=1234, max_tokens=20, ignore_eos=True, n=2)
    prompt = requests(family, 32)[3][0]
    alone = llm.generate(prompt, params, use_tqdm=False)[0]
    others = [p for p, _ in requests(family, 12)]
    noisy = SamplingParams(temperature=1.3, max_tokens=15, ignore_eos=True)
    outputs = llm.generate([*others, prompt], [noisy] * len(others) + [params], use_tqdm=False)
    beside = outputs[-1]
    assert [o.token_ids for o in beside.outputs] == [o.token_ids for o in alone.outputs]
    assert alone.outputs[0].token_ids != alone.outputs[1].token_ids


def test_bad_requests_fail_alone(llm: LLM, family: str) -> None:
    kind = FAMILIES[family]
    good = requests(family, 20, seed=7)
    mark = kind.image_text(1)
    picture_prompt = {"prompt": mark, "multi_modal_data": {"image": picture(PICTURES[0])}}
    [item] = llm.engine.frontend.processor.process(picture_prompt).media
    too_wide = torch.zeros(item.mapped.num_embeds, llm.engine.executor.model.hidden_size + 1)
    wrong = kind.embeds_input([too_wide], [item.mapped.geometry])
    limit = llm.engine.resolved.max_model_len
    bad: dict[type[RequestError], dict[str, Any]] = {
        MediaError: {"prompt": mark, "multi_modal_data": {"image": np.zeros((0, 5, 3), np.uint8)}},
        PromptTooLongError: {"prompt_token_ids": [5] * limit},
        RequestError: {"prompt": mark, "multi_modal_data": {"image": wrong}},
    }
    plain = tokens(llm, good)
    mixed: list[Any] = [prompt for prompt, _ in good]
    params = [params for _, params in good]
    for place, prompt in zip([0, 9, 15], bad.values()):
        mixed.insert(place, prompt)
        params.insert(place, SamplingParams(temperature=0, max_tokens=4))
    with pytest.raises(RequestsFailed) as caught:
        llm.generate(mixed, params, use_tqdm=False)
    outputs = caught.value.outputs
    for place, kind_of_error in zip([0, 9, 15], bad):
        error = outputs[place].error
        assert isinstance(error, kind_of_error)
        assert len(str(error)) > 20
    assert [o.outputs[0].token_ids for o in outputs if o.error is None] == plain
    returned = llm.generate(mixed, params, use_tqdm=False, on_error="return")
    assert sum(output.error is not None for output in returned) == 3


def test_too_many_images_name_the_limit_and_the_flag(family: str) -> None:
    kind = FAMILIES[family]
    with load(family, limit_mm_per_prompt={"image": 1}) as limited:
        good = {"prompt": kind.image_text(1), "multi_modal_data": {"image": picture(PICTURES[0])}}
        marks = kind.image_text(1) + kind.image_text(2)
        many = {"prompt": marks, "multi_modal_data": {"image": [picture(name) for name in PICTURES[:2]]}}
        params = SamplingParams(temperature=0, max_tokens=4)
        outputs = limited.generate([good, many, good], params, use_tqdm=False, on_error="return")
        assert "limit_mm_per_prompt" in str(outputs[1].error)
        assert outputs[0].outputs[0].token_ids == outputs[2].outputs[0].token_ids
        with pytest.raises(MediaError, match="1 image"):
            limited.generate(many, params, use_tqdm=False)


def test_unknown_modality_in_the_limits_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="images"):
        load(family, limit_mm_per_prompt={"images": 2})


def same_tensors(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether two items were mapped from the same picture."""
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_a_failing_encoder_fails_only_requests_with_that_picture(family: str) -> None:
    with load(family) as fresh:
        kind = FAMILIES[family]

        def failing(modality: str, items: Any) -> Any:
            if any(same_tensors(item.tensors, broken) for item in items):
                raise RuntimeError("no")
            return encode(modality, items)

        prompts = [
            {"prompt": kind.image_text(1) + " what?", "multi_modal_data": {"image": picture(name)}}
            for name in PICTURES
        ]
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        healthy = fresh.generate(prompts, params, use_tqdm=False)
        broken = fresh.engine.frontend.processor.process(prompts[1]).media[0].mapped.tensors
    with load(family) as fresh:
        # Of all ranks: another process has an encoder of its own.
        executor = fresh.engine.executor
        encode = executor.encode
        executor.encode = failing  # type: ignore[method-assign]
        outputs = fresh.generate(prompts, params, use_tqdm=False, on_error="return")
        for index, (output, before) in enumerate(zip(outputs, healthy)):
            if index == 1:
                assert "could not be encoded" in str(output.error)
            else:
                assert output.outputs[0].token_ids == before.outputs[0].token_ids
        assert fresh.engine.stats().kv_blocks_used == 0
