"""InternVL through the public `LLM`: chats, embeddings, prompts of ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from opsin import LLM, SamplingParams
from opsin.inputs.chat import ChatOptions
from tests.models.families import encoded
from tests.models.golden import picture
from tests.models.made.internvl import HUB_TEMPLATE, InternVL
from tests.models.made.smolvlm import frames_of

CAT = picture("cat_150x240.png")
FRAMES = frames_of([CAT, picture("coffee_320x213.png")])
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
IMAGE, VIDEO = {"type": "image", "image": CAT}, {"type": "video", "video": FRAMES}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "And "}, IMAGE, VIDEO]},
    ],
]


@pytest.fixture(scope="module", params=["the hub's template", "none"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("checkpoint")
    InternVL(folder, template=HUB_TEMPLATE if request.param != "none" else None)
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**23) as loaded:
        yield loaded


@pytest.mark.parametrize("chat", CHATS)
def test_chats_are_rendered_as_the_hubs_template_renders_them(llm: LLM, chat: list[dict[str, Any]]) -> None:
    frontend = llm.engine.frontend
    rendered = frontend.renderer.render(frontend.conversation(chat), ChatOptions()).text
    tokenizer: Any = frontend.tokenizer
    assert rendered == tokenizer.apply_chat_template(
        chat, chat_template=HUB_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    [output] = llm.chat(chat, GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 6


def test_frames_are_numbered(llm: LLM) -> None:
    [output] = llm.generate(
        {"prompt": "What?<video>Tell me", "multi_modal_data": {"video": [FRAMES]}}, GREEDY, use_tqdm=False
    )
    text = llm.engine.frontend.tokenizer.decode(output.prompt_token_ids)
    frame = "<img>" + 4 * "<IMG_CONTEXT>" + "</img>"
    assert text == f"What?Frame1: {frame}\nFrame2: {frame}Tell me"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_embeddings_are_as_good_as_pixels(llm: LLM, kind: str) -> None:
    item: Any = CAT if kind == "image" else FRAMES
    mark = "<IMG_CONTEXT>" if kind == "image" else "<video>"
    prompt = {"prompt": f"{mark}What is it?", "multi_modal_data": {kind: [item]}}
    [expected] = llm.generate(prompt, GREEDY, use_tqdm=False)
    [embeds] = encoded(llm, llm.engine.frontend.processor.process(prompt))
    for data in (embeds, {f"{kind}_embeds": embeds}):
        [given] = llm.generate({**prompt, "multi_modal_data": {kind: data}}, GREEDY, use_tqdm=False)
        assert given.prompt_token_ids == expected.prompt_token_ids
        assert given.outputs[0].token_ids == expected.outputs[0].token_ids


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_prompt_of_ids_is_expanded(llm: LLM, kind: str) -> None:
    tokenizer: Any = llm.engine.frontend.tokenizer
    item: Any = CAT if kind == "image" else FRAMES
    text = "\n<IMG_CONTEXT>\n?" if kind == "image" else "\n<video>\n?"
    prompts = ({"prompt": text}, {"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)})
    written, as_ids = (
        llm.engine.frontend.processor.process({**prompt, "multi_modal_data": {kind: [item]}})
        for prompt in prompts
    )
    assert list(written.token_ids) == list(as_ids.token_ids)
    assert "<|im_end|>" in {tokenizer.decode([token]) for token in llm.engine.frontend.eos_token_ids}
