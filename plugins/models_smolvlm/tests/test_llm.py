"""SmolVLM through the public `LLM`: chats, videos as files and frames, embeddings, stops."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from opsin import LLM, SamplingParams
from opsin.errors import RequestError
from opsin.inputs.chat import ChatOptions
from tests.models.families import encoded
from tests.models.golden import GOLDEN, picture
from tests.models.made.smolvlm import HUB_TEMPLATE, SmolVLM, frames_of

CAT = picture("cat_150x240.png")
FRAMES = frames_of([CAT, picture("coffee_320x213.png")])
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": CAT}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image", "image": CAT}]},
    ],
    [{"role": "user", "content": [{"type": "video", "video": FRAMES}, {"type": "text", "text": "What?"}]}],
    [{"role": "user", "content": [{"type": "text", "text": "What? "}, {"type": "video", "video": FRAMES}]}],
]


@pytest.fixture(scope="module", params=["the hub's template", "none"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("checkpoint")
    SmolVLM(folder, template=HUB_TEMPLATE if request.param != "none" else None)
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**23) as loaded:
        yield loaded


@pytest.mark.parametrize("chat", CHATS)
def test_chats_are_rendered_as_transformers_renders_them(llm: LLM, chat: list[dict[str, Any]]) -> None:
    """Which takes another template for videos, since the checkpoints' own knows none."""
    parts = [
        {
            "role": m["role"],
            "content": m["content"]
            if isinstance(m["content"], list)
            else [{"type": "text", "text": m["content"]}],
        }
        for m in chat
    ]
    frontend = llm.engine.frontend
    rendered = frontend.renderer.render(frontend.conversation(chat), ChatOptions()).text
    tokenizer: Any = frontend.tokenizer
    assert rendered == tokenizer.apply_chat_template(
        parts, chat_template=DEFAULT_CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    [output] = llm.chat(chat, GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 6


def test_words_of_a_user_are_never_a_picture(llm: LLM) -> None:
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": CAT}, {"type": "text", "text": "<image><video>?"}],
        }
    ]
    [output] = llm.chat(chat, GREEDY, use_tqdm=False)
    tokenizer: Any = llm.engine.frontend.tokenizer
    image, video = (tokenizer.convert_tokens_to_ids(text) for text in ("<image>", "<video>"))
    frontend = llm.engine.frontend
    media = frontend.chat(frontend.conversation(chat), ChatOptions()).media
    assert output.prompt_token_ids.count(image) == media[0].mapped.num_embeds
    assert video not in output.prompt_token_ids
    assert "<image><video>?" in tokenizer.decode(output.prompt_token_ids)


def test_an_animated_picture_is_a_video_with_times(llm: LLM) -> None:
    file = io.BytesIO()
    frames = [picture("cat_150x240.png").resize((60, 44)), picture("coffee_320x213.png").resize((60, 44))]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=2000)
    [output] = llm.generate(
        {"prompt": "<video>What?", "multi_modal_data": {"video": file.getvalue()}}, GREEDY, use_tqdm=False
    )
    text = llm.engine.frontend.tokenizer.decode(output.prompt_token_ids)
    assert "series of two frames from a 0:00:04 [H:MM:SS] video.\n\nFrame from 00:00:" in text
    assert "\nFrame from 00:02:" in text


@pytest.mark.parametrize("kind", ["image", "video"])
def test_embeddings_are_as_good_as_pixels(llm: LLM, kind: str) -> None:
    item: Any = CAT if kind == "image" else FRAMES
    prompt = {"prompt": f"<{kind}>What is it?", "multi_modal_data": {kind: [item]}}
    [expected] = llm.generate(prompt, GREEDY, use_tqdm=False)
    done = llm.engine.frontend.processor.process(prompt)
    [embeds] = encoded(llm, done)
    data: Any = {"video_embeds": embeds}
    if kind == "image":
        squares = done.media[0].mapped.geometry
        data = {"image_embeds": embeds, "rows": [squares.rows], "cols": [squares.columns]}
    [given] = llm.generate({**prompt, "multi_modal_data": {kind: data}}, GREEDY, use_tqdm=False)
    assert given.prompt_token_ids == expected.prompt_token_ids
    assert given.outputs[0].token_ids == expected.outputs[0].token_ids


def test_a_prompt_of_ids_is_expanded(llm: LLM) -> None:
    tokenizer: Any = llm.engine.frontend.tokenizer
    ids = tokenizer.encode("<image>?", add_special_tokens=False)
    text, as_ids = (
        llm.engine.frontend.processor.process({**prompt, "multi_modal_data": {"image": [CAT]}})
        for prompt in ({"prompt": "<image>?"}, {"prompt_token_ids": ids})
    )
    assert list(text.token_ids) == list(as_ids.token_ids)


def test_the_end_of_an_utterance_ends_an_answer(llm: LLM) -> None:
    tokenizer: Any = llm.engine.frontend.tokenizer
    assert tokenizer.convert_tokens_to_ids("<end_of_utterance>") in llm.engine.frontend.eos_token_ids


def test_idefics3_takes_no_videos(tmp_path: Path) -> None:
    SmolVLM(tmp_path, idefics=True)
    with (
        LLM(str(tmp_path), dtype="float32", kv_cache_memory=2**22) as llm,
        pytest.raises(RequestError, match="video"),
    ):
        llm.generate({"prompt": "<video>", "multi_modal_data": {"video": [FRAMES]}}, use_tqdm=False)


def test_embedding_vectors_are_transformers(tmp_path: Path) -> None:
    theirs = SmolVLM(tmp_path)
    inputs = theirs.inputs("<image>What?", {"image": [CAT]})
    with torch.inference_mode():
        hidden = theirs.model.model(input_ids=inputs.ids, use_cache=False, **inputs.media).last_hidden_state
    with LLM(str(tmp_path), dtype="float32", kv_cache_memory=2**22) as llm:
        [output] = llm.embed({"prompt": "<image>What?", "multi_modal_data": {"image": [CAT]}}, use_tqdm=False)
    expected = torch.nn.functional.normalize(hidden[0, -1], dim=0)
    assert output.outputs is not None
    assert float((output.outputs.data - expected).abs().max()) < 1e-5


def test_the_recorded_checkpoint_is_there() -> None:
    assert (GOLDEN / "smolvlm/model/model.safetensors").is_file()
