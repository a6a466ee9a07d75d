"""What cannot fit is refused before it costs; what is prepared ahead is bounded by bytes."""

import asyncio
import gc
import io
import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin import LLM, AsyncEngine, EngineConfig, SamplingParams
from opsin.api import EmbedCounter, InputContext, MappedMedia, MediaItem, PlacedMedia, ProcessedPrompt
from opsin.checkpoint.files import load
from opsin.checkpoint.tokenizer import load_tokenizer
from opsin.errors import MediaError, PromptTooLongError, RequestsFailed
from opsin.inputs.cache import HeldMedia
from opsin.inputs.feed import Feed
from opsin.inputs.processor import PIECE, UNSURE, _least_tokens
from opsin.plugins import load_plugins
from tests.core.test_media import png_header
from tests.core.test_prompt import HIDDEN, ByteTokenizer, Mapper, picture, processor

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ["llava15", "llava_next", "minicpmv20", "minicpmv25", "minicpmv26", "phi3v", "qwen2vl"]
MARK = "<|vision_start|><|image_pad|><|vision_end|>"


# --- sizes before pixels --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_families_count_embeddings_as_they_map(family: str) -> None:
    checkpoint = load(str(GOLDEN / family / "model"))
    context = InputContext(
        config=checkpoint.config,
        preprocessor=checkpoint.preprocessor,
        tokenizer=load_tokenizer(checkpoint.path),
    )
    given_options = {
        "minicpmv": [{}, {"max_slice_nums": 1}, {"max_slice_nums": 5}],
        "phi3v": [{}, {"num_crops": 1}, {"num_crops": 16}],
        "qwen2vl": [{}, {"max_pixels": 20_000}, {"min_pixels": 20_000}],
    }.get(family.rstrip("0123456789"), [{}])
    for modality, spec in load_plugins().input_mappers(checkpoint.architecture).items():
        mapper = spec.build(context)
        if mapper is None:
            continue
        assert isinstance(mapper, EmbedCounter)
        assert mapper.size_option is None or mapper.size_option in mapper.option_names
        for width, height in ((1, 1), (30, 20), (20, 30), (337, 336), (640, 200), (199, 1), (90, 700)):
            for frames in (1,) if modality == "image" else (1, 2, 5):
                pixels = np.zeros((frames, height, width, 3), np.uint8)
                item = MediaItem(
                    modality=modality, digest="d", pixels=pixels[0] if modality == "image" else pixels
                )
                for options in given_options:
                    counted = mapper.count_embeds(width, height, frames, options)
                    assert counted == mapper.map(item, options).num_embeds, (modality, width, height, options)


class CountingMapper(Mapper):
    """One embedding per pixel, known beforehand."""

    size_option = "repeat"

    def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
        if width > 10 * height:
            raise ValueError("too wide")
        return width * height * frames

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        self.calls.append(item)
        assert item.pixels is not None
        count = item.pixels.size // 3
        return MappedMedia(num_embeds=count, tensors={"pixels": torch.tensor(item.pixels)})


def asked(*pictures: Any, text: str = "") -> dict[str, Any]:
    return {"prompt": "<img>" * len(pictures) + text, "multi_modal_data": {"image": list(pictures)}}


def test_a_picture_too_large_for_the_context_is_refused_by_its_header() -> None:
    mapper = CountingMapper()
    huge = png_header(5000, 4000)  # decoding it would say that it is damaged
    with pytest.raises(
        PromptTooLongError,
        match=r"at least 20000000 tokens \(20000000 of them for media\); the context holds 1000, .* "
        "mm_processor_kwargs with a smaller repeat makes media smaller",
    ):
        processor(mapper=mapper).process(asked(huge))
    with pytest.raises(MediaError, match="damaged"):
        processor(mapper=mapper, max_model_len=30_000_000).process(asked(huge))
    with pytest.raises(PromptTooLongError, match=r"at least 1100 tokens"):  # together
        processor(mapper=mapper).process(asked(*[png_header(11, 20)] * 5))
    video = {"prompt": "(clip)", "multi_modal_data": {"video": [png_header(10, 20)] * 6}}
    with pytest.raises(PromptTooLongError, match="at least 1200 tokens"):
        processor(mapper=mapper).process(video)
    assert not mapper.calls


def test_a_size_is_counted_as_stored_and_as_it_may_be_turned() -> None:
    """What a family refuses of one of the two may still be the other."""
    mapper = CountingMapper()
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (33, 3)).save(buffer, "PNG", exif=exif)
    prompt = processor(mapper=mapper).process(asked(buffer.getvalue()))
    assert prompt.media[0].mapped.num_embeds == 99
    assert mapper.calls[0].pixels is not None
    assert mapper.calls[0].pixels.shape == (33, 3, 3)

    class Neither(CountingMapper):
        def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
            raise ValueError("too odd")

    with pytest.raises(MediaError, match="image 2: too odd"):
        processor(mapper=Neither()).process(asked({"rows": [torch.ones(1, HIDDEN)]}, png_header(9, 9)))


def test_without_a_count_the_next_item_is_not_decoded_once_the_context_is_full() -> None:
    mapper = Mapper()
    with pytest.raises(PromptTooLongError, match=r"at least 109 tokens \(104 of them"):
        processor(mapper=mapper, max_model_len=100).process(asked(picture(51), picture(53), png_header(9, 9)))
    assert len(mapper.calls) == 2


def test_what_was_refused_leaves_the_cache_and_what_others_use_stays() -> None:
    mine = processor(max_model_len=100)
    kept = mine.process(asked(picture(20)))
    assert (len(mine.mapped_media), mine.mapped_media.num_bytes) == (1, 18)
    with pytest.raises(PromptTooLongError):
        mine.process(asked(picture(20), picture(30), picture(40), picture(50)))
    with pytest.raises(MediaError, match="too bright"):
        mine.process(asked(picture(31), picture(101)))
    assert (len(mine.mapped_media), mine.mapped_media.num_bytes) == (1, 18)
    assert mine.held_media.num_bytes == 18
    del kept
    assert mine.held_media.num_bytes == 0


# --- text -----------------------------------------------------------------------------------------


class Untouchable(ByteTokenizer):
    """Takes only so much text at once."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert len(text) <= PIECE, "all of a long text was tokenized"
        return super().encode(text, add_special_tokens=add_special_tokens)


def test_a_long_text_is_refused_without_tokenizing_all_of_it() -> None:
    with pytest.raises(PromptTooLongError, match="at least 65408 tokens; the context holds 1000"):
        processor(tokenizer=Untouchable()).process("x" * 10_000_000)
    with pytest.raises(PromptTooLongError, match=r"at least 65414 tokens \(10 of them"):
        processor(tokenizer=Untouchable(), mapper=CountingMapper()).process(
            asked(np.zeros((2, 5, 3), np.uint8), text="x" * 10_000_000)
        )


def test_a_text_that_is_to_be_truncated_has_a_limit_too() -> None:
    with pytest.raises(PromptTooLongError, match="has 10000000 characters; one that is to be .* 1048576"):
        processor(tokenizer=Untouchable()).process("x" * 10_000_000, truncate=5)
    assert len(processor(tokenizer=ByteTokenizer()).process("x" * 10_000, truncate=5).token_ids) == 5


TOKENIZERS = {family: load_tokenizer(GOLDEN / family / "model") for family in FAMILIES}
PIECES = [
    "a",
    "ab",
    "aaaaaaa",
    " ",
    "   ",
    "\n",
    "the ",
    "é",
    "日本",
    "👍",
    "0",
    "1234567",
    "<|im_end|>",
    "<image>",
    "!?",
]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), variety=st.integers(1, 6))
def test_a_text_never_has_fewer_tokens_than_its_pieces_say(family: str, seed: int, variety: int) -> None:
    """Also for texts whose tokens run over the cuts: long runs of few different pieces."""
    rng = random.Random(seed)
    words = rng.choices(PIECES, k=variety)
    text = "".join(rng.choices(words, k=PIECE))[: 2 * PIECE + rng.randrange(PIECE)]
    tokenizer = TOKENIZERS[family]
    enough = 10**9 if len(text) <= PIECE else len(text) // 8
    assert _least_tokens(tokenizer, text, enough) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_pieces_tell_nearly_the_number_of_tokens() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 5000
    tokenizer = TOKENIZERS["qwen2vl"]
    exact = len(tokenizer.encode(text, add_special_tokens=False))
    assert _least_tokens(tokenizer, text, exact) == 0  # an ordinary length for so many tokens
    assert exact // 8 < _least_tokens(tokenizer, text, exact // 8) < exact // 8 + PIECE - UNSURE


# --- bytes ----------------------------------------------------------------------------------------


def placed(key: str, num_bytes: int) -> PlacedMedia:
    mapped = MappedMedia(num_embeds=1, tensors={"x": torch.zeros(num_bytes, dtype=torch.uint8)})
    return PlacedMedia(modality="image", key=key, mapped=mapped, start=0, is_embed=[True])


def test_media_are_held_once_per_content_until_the_last_prompt_is_gone() -> None:
    held = HeldMedia(100)
    items = [placed("a", 60), placed("a", 60), placed("b", 30)]
    for item in items:
        held.add(item)
    assert held.num_bytes == 90
    assert held.has_room()
    items.append(placed("c", 10))
    held.add(items[-1])
    del item
    assert not held.has_room()
    del items[0]
    assert held.num_bytes == 100
    del items[0]
    assert held.num_bytes == 40
    items.clear()
    assert held.num_bytes == 0


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_feed_prepares_no_more_than_there_is_room_for(num_threads: int) -> None:
    held, most, lock = HeldMedia(100), 0, threading.Lock()

    def job() -> ProcessedPrompt:
        nonlocal most
        item = placed(str(random.random()), 40)
        with lock:
            held.add(item)
            most = max(most, held.num_bytes)
        return ProcessedPrompt(token_ids=[1], media=[item])

    feed = Feed((job for _ in range(50)), num_threads=num_threads, ahead=30, has_room=held.has_room)
    in_engine: list[ProcessedPrompt] = []
    indices = []
    while feed:
        ready = feed.take(0.01 if in_engine else None)
        if ready is None:
            in_engine.pop(0)  # one is answered
            continue
        indices.append(ready[0])
        in_engine.append(ready[1].result())
        del ready
    feed.close()
    assert indices == list(range(50))
    assert most <= 120 + 40 * num_threads


def test_a_prompt_larger_than_all_room_is_prepared_alone() -> None:
    held = HeldMedia(10)

    def job() -> ProcessedPrompt:
        item = placed("a", 1000)
        held.add(item)
        return ProcessedPrompt(token_ids=[1], media=[item])

    feed = Feed([job, job], num_threads=2, ahead=4, has_room=held.has_room)
    taken = 0
    while feed:
        taken += feed.take(None) is not None
    assert taken == 2


def qwen(**settings: Any) -> dict[str, Any]:
    return {
        "model": str(GOLDEN / "qwen2vl" / "model"),
        "dtype": "float32",
        "kv_cache_memory": 2**23,
        **settings,
    }


def test_a_batch_with_little_room_gives_the_same_answers() -> None:
    rng = np.random.default_rng(5)
    prompts = [
        {
            "prompt": f"{MARK}{number}",
            "multi_modal_data": {"image": rng.integers(0, 256, (56, 84, 3), dtype=np.uint8)},
        }
        for number in range(12)
    ]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    answers = []
    for memory in (2**30, 1):
        with LLM(**qwen(pending_media_memory=memory, media_cache_memory=0)) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            gc.collect()
            assert llm.engine.frontend.processor.held_media.num_bytes == 0
        answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1]


def test_a_refused_picture_names_the_option_and_the_others_go_on() -> None:
    large = Image.new("RGB", (2000, 2000))
    prompts = [
        {"prompt": MARK, "multi_modal_data": {"image": image}} for image in (large, Image.new("L", (9, 9)))
    ]
    with LLM(**qwen(max_model_len=200, mm_processor_kwargs={"max_pixels": 4_000_000})) as llm:
        with pytest.raises(RequestsFailed, match="smaller max_pixels") as caught:
            llm.generate(prompts, SamplingParams(max_tokens=2), use_tqdm=False)
        assert caught.value.outputs[1].error is None
        fewer = {**prompts[0], "mm_processor_kwargs": {"max_pixels": 28 * 28 * 100}}
        assert llm.generate(fewer, SamplingParams(max_tokens=2), use_tqdm=False)[0].error is None


def test_requests_of_a_server_wait_for_room() -> None:
    rng = np.random.default_rng(6)
    most = 0

    async def ask(engine: AsyncEngine, number: int) -> list[int]:
        nonlocal most
        pixels = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
        prompt = {"prompt": f"{MARK}{number}", "multi_modal_data": {"image": pixels}}
        async for output in engine.generate(prompt, SamplingParams(max_tokens=8, ignore_eos=True)):
            most = max(most, engine.frontend.processor.held_media.num_bytes)
            last = output
        return last.outputs[0].token_ids

    async def ask_all(engine: AsyncEngine) -> list[list[int]]:
        return await asyncio.gather(*(ask(engine, number) for number in range(16)))

    one_item = 64 * 3 * 2 * 14 * 14 * 4
    config = EngineConfig(**qwen(pending_media_memory=one_item, media_cache_memory=0))
    engine = AsyncEngine.from_config(config)
    try:
        assert [len(ids) for ids in asyncio.run(ask_all(engine))] == [8] * 16
    finally:
        engine.close()
    assert 0 < most < 8 * one_item


def test_the_tiny_qwen_takes_a_photograph_of_12_megapixels() -> None:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((4000, 3000)).convert("RGB").save(buffer, "JPEG")
    with LLM("opsin/tiny-qwen2vl", kv_cache_memory=2**26) as llm:
        part = {"type": "image", "image": buffer.getvalue()}
        [output] = llm.chat([{"role": "user", "content": [part, "What is it?"]}], use_tqdm=False)
    assert 40 < len(output.prompt_token_ids) < 80, "scaled down to what it was trained on"
    assert output.outputs[0].text == "I see no shape I know."
