"""How a request is computed must not show, on the simulated card as on the CPU: token for token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from opsin import LLM, SamplingParams
from tests.mlu_sim import CARD
from tests.models.families import FAMILIES, encoded
from tests.models.golden import GOLDEN, cases, picture
from tests.models.test_invariance import requests, tokens

pytestmark = pytest.mark.usefixtures("exact")

COUNT = 6

QUICK = ("llava_next", "minicpmv26", "phi3v", "qwen2vl")
"""One of each group of families; the others take their minutes in the full run."""


def load(family: str, device: str = "mlu", **settings: Any) -> LLM:
    settings = {"dtype": "float32", "kv_cache_memory": 2**24, **settings}
    return LLM(str(GOLDEN / family / "model"), device=device, **settings)


@pytest.fixture(
    scope="module",
    params=[
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES)
    ],
)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(family: str) -> list[list[int]]:
    """On the CPU, one by one and without a prefix cache: the plainest way."""
    with load(family, "cpu", enable_prefix_caching=False) as plain:
        return [tokens(plain, (one,))[0] for one in requests(family, COUNT)]


@pytest.fixture(scope="module")
def llm(family: str, exact: None) -> Iterator[LLM]:
    with load(family) as loaded:
        yield loaded


def test_mixed_requests_in_one_batch(llm: LLM, family: str, expected: list[list[int]]) -> None:
    with CARD.recorded() as trace:
        assert tokens(llm, requests(family, COUNT)) == expected
    assert trace["tmo::flash_attention"]
    assert trace["tmo::single_query_cached_kv_attn"]


def test_chunked_prefill(family: str, expected: list[list[int]]) -> None:
    with load(family, max_num_batched_tokens=29) as chunked, CARD.recorded() as trace:
        assert tokens(chunked, requests(family, COUNT)) == expected
    # Steps that prefill and decode at once run both kernels in every layer.
    assert (
        trace["tmo::flash_attention"] + trace["tmo::single_query_cached_kv_attn"]
        > trace["tmo::reshape_paged_cache"]
    )


def test_prefix_cache(llm: LLM, family: str, expected: list[list[int]]) -> None:
    tokens(llm, requests(family, COUNT))
    hits = llm.engine.stats().prefix_hits
    assert tokens(llm, requests(family, COUNT)) == expected
    assert llm.engine.stats().prefix_hits > hits


def test_preemption(llm: LLM, family: str, expected: list[list[int]]) -> None:
    longest = max(
        len(llm.engine.frontend.processor.process(prompt).token_ids) + (params.max_tokens or 0)
        for prompt, params in requests(family, COUNT)
    )
    executor = llm.engine.executor
    assert executor.device.kv_row_elements is not None
    geometry = executor.model.kv_geometry
    per_token = 2 * 4 * geometry.num_layers * executor.device.kv_row_elements(geometry)
    # Room for hardly more than the longest one: answers soon collide.
    with load(family, kv_cache_memory=(longest + 48) * per_token, enable_prefix_caching=False) as tight:
        short = requests(family, COUNT)
        assert tokens(tight, short) == expected
        grown = [
            (prompt, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)) for prompt, _ in short
        ]
        texts = tuple(entry for entry in grown if "multi_modal_data" not in entry[0])
        crowd = texts * 6
        assert len({tuple(answer) for answer in tokens(tight, crowd)}) == len(texts)
        assert tight.engine.stats().num_preemptions > 0


def test_embeddings_instead_of_pictures(llm: LLM, family: str) -> None:
    kind = FAMILIES[family]
    names = ["coffee_320x213.png", "astronaut_96x96.png"]
    marks = "".join(kind.image_text(n + 1) for n in range(len(names)))
    prompt = {"prompt": f"{marks}\nwhich?", "multi_modal_data": {"image": [picture(name) for name in names]}}
    processed = llm.engine.frontend.processor.process(prompt)
    embeds = encoded(llm, processed)
    assert all(part.device.type == "mlu" for part in embeds)
    given = kind.embeds_input([part.cpu() for part in embeds], [m.mapped.geometry for m in processed.media])
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    before = llm.engine.runner.num_encoded
    [from_pixels] = llm.generate(prompt, params, use_tqdm=False)
    encoded_now = llm.engine.runner.num_encoded
    [from_embeds] = llm.generate({**prompt, "multi_modal_data": {"image": given}}, params, use_tqdm=False)
    assert llm.engine.runner.num_encoded == encoded_now >= before
    assert from_embeds.outputs[0].token_ids == from_pixels.outputs[0].token_ids


def test_sampling_is_the_cpu_s(llm: LLM, family: str) -> None:
    """Seeds, penalties and log-probabilities work on logits that are on the card."""
    params = SamplingParams(
        temperature=0.9,
        top_p=0.9,
        top_k=40,
        seed=11,
        n=2,
        max_tokens=10,
        ignore_eos=True,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        logit_bias={7: -1.5},
        logprobs=3,
        prompt_logprobs=2,
    )
    prompt = requests(family, COUNT)[1][0]
    [given] = llm.generate(prompt, params, use_tqdm=False)
    with load(family, "cpu") as plain:
        [wanted] = plain.generate(prompt, params, use_tqdm=False)
    assert [o.token_ids for o in given.outputs] == [o.token_ids for o in wanted.outputs]
    assert given.outputs[0].cumulative_logprob == pytest.approx(
        wanted.outputs[0].cumulative_logprob, abs=1e-3
    )
    assert given.prompt_logprobs is not None
    assert wanted.prompt_logprobs is not None
    for mine, theirs in zip(given.prompt_logprobs[1:], wanted.prompt_logprobs[1:], strict=True):
        assert mine is not None
        assert theirs is not None
        assert {k: v.logprob for k, v in mine.items()} == pytest.approx(
            {k: v.logprob for k, v in theirs.items()}, abs=1e-3
        )


def test_video_families_have_a_recorded_video() -> None:
    """The videos themselves run in test_golden.py."""
    able = {family for family, kind in FAMILIES.items() if kind.has_video}
    recorded = {family for family in FAMILIES if any(case.data.get("videos") for case in cases(family))}
    assert recorded <= able
    assert able - recorded == {"minicpmv26"}, "no case of its videos is recorded"


def test_vectors_of_the_embed_task() -> None:
    """Qwen2-VL's embedding models pool the last token."""
    prompts = [prompt for prompt, _ in requests("qwen2vl", 4)]
    with load("qwen2vl", "cpu", task="embed") as plain:
        wanted = plain.embed(prompts, use_tqdm=False)
    for dtype, tolerance in (("float32", 1e-5), ("float16", 5e-3)):
        with load("qwen2vl", task="embed", dtype=dtype, max_num_batched_tokens=40) as llm:
            given = llm.embed(prompts, use_tqdm=False)
        for mine, theirs in zip(given, wanted, strict=True):
            assert mine.outputs is not None
            assert theirs.outputs is not None
            assert (mine.outputs.data - theirs.outputs.data).abs().max() < tolerance
