"""Items that become text of the prompt (`Placeholder.expand_text`), tokenized with the words around them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from opsin.api import MappedMedia, MediaItem, ModelSpec, Placeholder, expand_by_text, repeat_token
from opsin.errors import ConfigError, PromptTooLongError, RequestError
from opsin.inputs.processor import PromptProcessor

IMAGE, EMBED = 0, 1


class WordTokenizer:
    """Words with the space before them, and runs of white space: what stands next to a text changes it."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {"<img>": IMAGE, "<pad>": EMBED}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        pieces = re.findall(r"<img>|<pad>| ?\w+|\s+|.", text)
        return [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        words = {token: word for word, token in self.ids.items()}
        return "".join(words[token] for token in token_ids)

    def convert_tokens_to_ids(self, tokens: str) -> int:
        return self.ids[tokens]


class Frames:
    """As many embeddings as the first pixel says."""

    option_names: frozenset[str] = frozenset()

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        assert item.pixels is not None
        count = int(item.pixels.flat[0])
        return MappedMedia(num_embeds=count, tensors={"pixels": torch.tensor(item.pixels)})

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, torch.Tensor]]:
        raise ValueError("none")


def timed(mapped: MappedMedia, number: int) -> str:
    """A clip and its frames in words."""
    return f"clip {number}:" + "".join(f"{second}s<pad>" for second in range(mapped.num_embeds)) + "\n\n"


def processor(tokenizer: WordTokenizer, **changes: Any) -> PromptProcessor:
    video = Placeholder(
        text=lambda number: "(clip)",
        expand=expand_by_text(tokenizer, timed, EMBED),
        expand_text=timed,
        embed_token_id=EMBED,
    )
    image = Placeholder(text=lambda number: "<img>", expand=repeat_token(IMAGE), token_id=IMAGE)
    settings: dict[str, Any] = {
        "model_spec": ModelSpec(architecture="Toy", build=lambda context: None),  # type: ignore[arg-type,return-value]
        "mappers": {"image": Frames(), "video": Frames()},
        "placeholders": {"image": image, "video": video},
        "tokenizer": tokenizer,
        "config": {},
        "max_model_len": 60,
        "vocab_size": 1000,
        "media_width": 4,
    }
    return PromptProcessor(**{**settings, **changes})


def picture(count: int) -> np.ndarray[Any, Any]:
    return np.full((2, 3, 3), count, np.uint8)


def test_the_words_of_an_item_are_tokenized_with_their_neighbours() -> None:
    tokenizer = WordTokenizer()
    media = {"image": [picture(2)], "video": [picture(3)[None], picture(1)[None]]}
    prompt = "See (clip)\n<img> or (clip)Why"
    done = processor(tokenizer).process({"prompt": prompt, "multi_modal_data": media})

    clips = ["clip 1:0s<pad>1s<pad>2s<pad>\n\n", "clip 2:0s<pad>\n\n"]
    whole = f"See {clips[0]}\n<img><img> or {clips[1]}Why"
    assert done.token_ids == tokenizer.encode(whole)
    assert " clip" in tokenizer.ids, "the space before the item's first word is that word's"
    assert "\n\n\n" in tokenizer.ids, "the item's last break and the prompt's are one token"
    # Each item is the tokens from its first embedding to its last.
    assert [item.modality for item in done.media] == ["video", "image", "video"]
    assert [tokenizer.decode(done.token_ids[item.start : item.end]) for item in done.media] == [
        "<pad>1s<pad>2s<pad>",
        "<img><img>",
        "<pad>",
    ]
    for item in done.media:
        marks = [token in (IMAGE, EMBED) for token in done.token_ids[item.start : item.end]]
        assert list(item.is_embed) == marks
        assert sum(marks) == item.mapped.num_embeds


def test_a_prompt_of_ids_takes_the_item_as_it_is_tokenized_alone() -> None:
    tokenizer = WordTokenizer()
    ids = tokenizer.encode("See (clip)Why")
    done = processor(tokenizer).process(
        {"prompt_token_ids": ids, "multi_modal_data": {"video": [picture(2)[None]]}}
    )
    expected = [*tokenizer.encode("See "), *tokenizer.encode("clip 1:0s<pad>1s<pad>\n\n")]
    assert done.token_ids == [*expected, *tokenizer.encode("Why")]


@pytest.mark.parametrize("prompt", ["(clip)<pad>", "<pad>(clip)"])
def test_the_token_of_an_embedding_has_no_other_place(prompt: str) -> None:
    with pytest.raises(RequestError, match="2 embed tokens for 1 embeddings"):
        processor(WordTokenizer()).process(
            {"prompt": prompt, "multi_modal_data": {"video": [picture(1)[None]]}}
        )


def test_placeholders_are_counted_as_ever() -> None:
    with pytest.raises(RequestError, match="0 video placeholder"):
        processor(WordTokenizer()).process(
            {"prompt": "clip", "multi_modal_data": {"video": [picture(1)[None]]}}
        )


def test_the_words_of_items_count_towards_the_context() -> None:
    with pytest.raises(PromptTooLongError):
        processor(WordTokenizer()).process(
            {"prompt": "(clip)", "multi_modal_data": {"video": [picture(40)[None]]}}
        )


def test_half_a_description_is_refused() -> None:
    with pytest.raises(ValueError, match="both or neither"):
        Placeholder(text=lambda number: "(clip)", expand=repeat_token(EMBED), expand_text=timed)
    tokenizer = WordTokenizer()
    silent = Placeholder(text=lambda number: "(pic)", expand=repeat_token(IMAGE))
    written = Placeholder(
        text=lambda number: "(clip)",
        expand=expand_by_text(tokenizer, timed, EMBED),
        expand_text=timed,
        embed_token_id=EMBED,
    )
    with pytest.raises(ConfigError, match="neither token_id nor expand_text"):
        processor(tokenizer, placeholders={"image": silent, "video": written})
