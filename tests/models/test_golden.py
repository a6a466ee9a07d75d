"""Recorded cases of independent implementations, through the public `LLM`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from opsin import LLM, SamplingParams
from opsin.errors import RequestError
from opsin.inputs.chat import ChatOptions
from opsin.inputs.prompt import Prompt
from tests.models.families import FAMILIES
from tests.models.golden import GOLDEN, Case, cases, largest_difference, recorded_logits


def rendered(llm: LLM, messages: Any, *, allow_special_tokens: bool) -> Prompt:
    frontend = llm.engine.frontend
    options = ChatOptions(allow_special_tokens=allow_special_tokens)
    return frontend.renderer.render(frontend.conversation(messages), options)


CASES = [case for family in FAMILIES for case in cases(family)]
NUM_STEPS = 16


@pytest.fixture(scope="module")
def llms() -> Iterator[dict[str, LLM]]:
    class Loaded(dict[str, LLM]):
        def __missing__(self, family: str) -> LLM:
            self[family] = LLM(str(GOLDEN / family / "model"), dtype="float32", kv_cache_memory=2**22)
            return self[family]

    loaded = Loaded()
    yield loaded
    for llm in loaded.values():
        llm.close()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompt_tokens_and_logits_are_the_recorded_ones(llms: dict[str, LLM], case: Case) -> None:
    llm = llms[case.family]
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS, ignore_eos=True)
    with recorded_logits(llm) as logits:
        [output] = llm.generate(case.prompt(), params, use_tqdm=False)
    assert output.prompt_token_ids == case.token_ids()
    safe = case.data["greedy_safe_len"]
    assert output.outputs[0].token_ids[:safe] == case.data["greedy_token_ids"][:safe]
    # The recorded logits follow the recorded tokens: comparable as far as the tokens agree.
    expected = case.tensors["step_logits"]
    agreed = next(
        (
            i
            for i, pair in enumerate(zip(output.outputs[0].token_ids, case.data["greedy_token_ids"]))
            if pair[0] != pair[1]
        ),
        NUM_STEPS - 1,
    )
    given = torch.cat(logits)
    assert given.shape == expected.shape
    assert largest_difference(given[: agreed + 1], expected[: agreed + 1]) < 1e-4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompt_logprobs_are_the_recorded_ones(llms: dict[str, LLM], case: Case) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    [output] = llms[case.family].generate(case.prompt(), params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    ids = output.prompt_token_ids
    given = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:]) if entry]
    # What was recorded for a negative id is another token's.
    known = torch.tensor(case.data["prompt_token_ids"][1:]) >= 0
    expected = case.tensors["prompt_logprobs"]
    assert len(given) == len(expected)
    assert largest_difference(torch.tensor(given)[known], expected[known]) < 1e-4


@pytest.mark.parametrize("case", [case for case in CASES if "pooled_last_l2" in case.tensors], ids=str)
def test_embeddings_are_the_recorded_ones(llms: dict[str, LLM], case: Case) -> None:
    llm = llms[case.family]
    if "embed" not in llm.engine.model_spec.tasks:
        with pytest.raises(RequestError, match="embeddings"):
            llm.embed(case.prompt(), use_tqdm=False)
        return
    [output] = llm.embed(case.prompt(), use_tqdm=False)
    assert output.prompt_token_ids == case.token_ids()
    assert output.outputs is not None
    assert case.differs("pooled_last_l2", output.outputs.data) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.data["messages"]], ids=str)
def test_messages_render_to_the_recorded_prompt(llms: dict[str, LLM], case: Case) -> None:
    media = {kind: iter(items) for kind, items in case.media().items()}
    messages = []
    has_placeholders = False
    for message in case.data["messages"]:
        content = message["content"]
        if isinstance(content, str):
            # The placeholders stand in the text already: the pictures are given alongside.
            texts = {FAMILIES[case.family].image_text(n + 1) for n in range(len(case.data["images"]))}
            count = sum(content.count(text) for text in texts)
            pictures = [{"type": "image", "image": next(media["image"])} for _ in range(count)]
            content = [*pictures, {"type": "text", "text": content}] if count else content
            has_placeholders |= count > 0
        else:
            content = [
                {"type": part["type"], part["type"]: next(media[part["type"]])}
                if part["type"] in media
                else part
                for part in content
            ]
        messages.append({**message, "content": content})
    llm = llms[case.family]
    text = rendered(llm, messages, allow_special_tokens=has_placeholders).text
    assert text + case.data["prompt"].removeprefix(text) == case.data["prompt"]
    params = SamplingParams(temperature=0, max_tokens=1)
    if text == case.data["prompt"]:
        [output] = llm.chat(
            messages,
            params,
            use_tqdm=False,
            mm_processor_kwargs=case.options(),
            allow_special_tokens=has_placeholders,
        )
        assert output.prompt_token_ids == case.token_ids()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_cases_at_once_give_the_same_tokens(llms: dict[str, LLM], family: str) -> None:
    mine = [case for case in CASES if case.family == family]
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS, ignore_eos=True)
    outputs = llms[family].generate([case.prompt() for case in mine], params, use_tqdm=False)
    for case, output in zip(mine, outputs, strict=True):
        safe = case.data["greedy_safe_len"]
        assert output.outputs[0].token_ids[:safe] == case.data["greedy_token_ids"][:safe]
