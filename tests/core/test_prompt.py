"""`opsin.prompt`, `opsin.placeholders`: markers are matched with items, expanded and placed, or refused."""

import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opsin.api import Expansion, MappedMedia, MediaItem, ModelSpec, PlacedMedia, Placeholder, Positions
from opsin.config import MediaLimits
from opsin.errors import ConfigError, MediaError, PromptTooLongError, RequestError
from opsin.inputs.processor import PromptProcessor

HIDDEN = 4
BOS, IMAGE, FILL, EDGE = 256, 257, 258, 259


class ByteTokenizer:
    """One token per UTF-8 byte, and two special ones."""

    bos_token = "<s>"
    specials: Mapping[str, int] = {"<s>": BOS, "<img>": IMAGE}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [BOS] if add_special_tokens else []
        for piece in re.split("(<s>|<img>)", text):
            ids += [self.specials[piece]] if piece in self.specials else list(piece.encode())
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")

    def convert_tokens_to_ids(self, tokens: str) -> int:
        return self.specials[tokens]


class Mapper:
    """As many embeddings as the first pixel says (times the option ``repeat``)."""

    option_names = frozenset({"repeat"})

    def __init__(self) -> None:
        self.calls: list[MediaItem] = []
        self.gate = threading.Event()
        self.gate.set()

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        self.calls.append(item)
        assert self.gate.wait(10)
        if item.embeds is not None:
            rows = item.embeds["rows"]
            return MappedMedia(num_embeds=len(rows), embeds=rows)
        assert item.pixels is not None
        count = int(item.pixels.flat[0]) * options.get("repeat", 1)
        if count > 100:
            raise ValueError("this picture is too bright")
        return MappedMedia(num_embeds=count, tensors={"pixels": torch.tensor(item.pixels)})

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, torch.Tensor]]:
        if isinstance(data, Mapping):
            if set(data) != {"rows"}:
                raise ValueError("expected a dict with rows")
            data = data["rows"]
        return [{"rows": rows} for rows in data]


def expand(mapped: MappedMedia, number: int) -> Expansion:
    """The embeddings between two tokens of text."""
    count = mapped.num_embeds
    return Expansion(token_ids=[EDGE, *[FILL] * count, EDGE], is_embed=[False, *[True] * count, False])


WHOLE = Placeholder(text=lambda n: "<img>", expand=expand, token_id=IMAGE)
CUT = Placeholder(text=lambda n: "(clip)", expand=expand)
NUMBERED = Placeholder(text=lambda n: f"<|image_{n}|>", expand=expand)


def processor(
    *, image: Placeholder = WHOLE, video: Placeholder = CUT, mapper: Mapper | None = None, **settings: Any
) -> PromptProcessor:
    mapper = mapper or Mapper()
    arguments: dict[str, Any] = {
        "model_spec": ModelSpec(architecture="Toy", build=lambda context: None),  # type: ignore[arg-type,return-value]
        "mappers": {"image": mapper, "video": mapper},
        "placeholders": {"image": image, "video": video},
        "tokenizer": ByteTokenizer(),
        "config": {},
        "max_model_len": 1000,
        "vocab_size": 300,
        "media_width": HIDDEN,
    }
    return PromptProcessor(**{**arguments, **settings})


def picture(count: int) -> np.ndarray[Any, Any]:
    """A picture that becomes ``count`` embeddings."""
    return np.full((2, 3, 3), count, np.uint8)


def expanded(count: int) -> list[int]:
    return [EDGE, *[FILL] * count, EDGE]


# --- placeholder arithmetic -----------------------------------------------------------------------

TEXT = st.text(alphabet="ab (<|é\n", max_size=6)
ITEM = st.tuples(st.sampled_from(["image", "video"]), st.integers(0, 5))


@given(
    first=TEXT, rest=st.lists(st.tuples(ITEM, TEXT), max_size=6), numbered=st.booleans(), as_ids=st.booleans()
)
def test_every_item_lands_where_its_placeholder_stood(
    first: str, rest: list[tuple[tuple[str, int], str]], numbered: bool, as_ids: bool
) -> None:
    image = NUMBERED if numbered else WHOLE
    first = "!" + first
    prompt, data = first, {"image": [], "video": []}  # type: ignore[var-annotated]
    expected, places = [BOS, *first.encode()], []
    for (modality, count), text in rest:
        data[modality].append(picture(count) if modality == "image" else picture(count)[None])
        prompt += (image if modality == "image" else CUT).text(len(data[modality])) + text
        places.append((modality, len(expected), count))
        expected += [*expanded(count), *text.encode()]
    if as_ids:
        asked = {"prompt_token_ids": ByteTokenizer().encode(prompt), "multi_modal_data": data}
    else:
        asked = {"prompt": prompt, "multi_modal_data": data}
    result = processor(image=image).process(asked)
    assert list(result.token_ids) == expected
    assert [(item.modality, item.start, sum(item.is_embed)) for item in result.media] == places
    for item in result.media:
        span = expected[item.start : item.end]
        assert [token == FILL for token in span] == list(item.is_embed)
    assert result.text == (None if as_ids else prompt)


@given(st.permutations([1, 2, 3]))
def test_a_numbered_placeholder_takes_the_item_it_names(order: list[int]) -> None:
    prompt = "".join(f"<|image_{number}|>" for number in order)
    data = {"image": [picture(10), picture(20), picture(30)]}
    result = processor(image=NUMBERED).process({"prompt": prompt, "multi_modal_data": data})
    assert [item.mapped.num_embeds for item in result.media] == [10 * number for number in order]


@given(st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_a_count_that_does_not_match_names_both_counts_and_the_placeholder(
    written: int, given_items: int, cut: bool
) -> None:
    placeholder = CUT if cut else WHOLE
    asked = {
        "prompt": "a" + placeholder.text(1) * written,
        "multi_modal_data": {"image": [picture(1)] * given_items},
    }
    process = processor(image=placeholder, video=NUMBERED).process
    if written == given_items:
        assert len(process(asked).media) == written
    else:
        with pytest.raises(
            RequestError, match=f"{written} image placeholder.* {given_items} image item"
        ) as caught:
            process(asked)
        assert placeholder.text(1) in str(caught.value)


@pytest.mark.parametrize("prompt", ["<|image_1|><|image_1|>", "<|image_1|><|image_3|>", "<|image_1|>"])
def test_numbered_placeholders_must_name_each_item_once(prompt: str) -> None:
    asked = {"prompt": prompt, "multi_modal_data": {"image": [picture(1)] * 2}}
    with pytest.raises(RequestError, match=r"<\|image_"):
        processor(image=NUMBERED).process(asked)


# --- tokenizing -----------------------------------------------------------------------------------


def test_a_text_that_brings_its_bos_is_not_given_another() -> None:
    process = processor().process
    assert process("hi").token_ids == process("<s>hi").token_ids == [BOS, *b"hi"]


def test_pieces_get_special_tokens_only_if_the_family_says_so() -> None:
    often = Placeholder(text=NUMBERED.text, expand=expand, special_tokens_per_chunk=True)
    asked = {"prompt": "<|image_1|>x<|image_2|>", "multi_modal_data": {"image": [picture(1), picture(2)]}}
    assert processor(image=NUMBERED).process(asked).token_ids == [BOS, *expanded(1), *b"x", *expanded(2)]
    assert processor(image=often).process(asked).token_ids == [
        *[BOS, *expanded(1)],
        *[BOS, *b"x", *expanded(2)],
        BOS,
    ]


OPTIONALLY_WHOLE = Placeholder(
    text=NUMBERED.text,
    expand=expand,
    special_tokens_per_chunk=True,
    tokenizes_whole=lambda options: bool(options.get("whole")),
    option_names=frozenset({"whole"}),
)


def test_an_option_of_the_placeholder_has_the_prompt_tokenized_as_a_whole() -> None:
    asked = {
        "prompt": "<|image_2|>x<|image_1|>",
        "multi_modal_data": {"image": [picture(1), picture(2)]},
        "mm_processor_kwargs": {"whole": True},
    }
    whole = [BOS, *expanded(2), *b"x", *expanded(1)]
    pieces = [BOS, *expanded(2), BOS, *b"x", *expanded(1), BOS]
    process = processor(image=OPTIONALLY_WHOLE).process
    assert process(asked).token_ids == whole
    assert process({**asked, "mm_processor_kwargs": {}}).token_ids == pieces
    for_all = processor(image=OPTIONALLY_WHOLE, options={"whole": True}).process
    assert for_all({**asked, "mm_processor_kwargs": {}}).token_ids == whole
    assert for_all({**asked, "mm_processor_kwargs": {"whole": False}}).token_ids == pieces
    with pytest.raises(RequestError, match=r"has '<\|image_2\|>', but 1 image"):
        process({**asked, "multi_modal_data": {"image": picture(1)}})


def test_a_placeholder_merged_with_its_neighbours_is_explained() -> None:
    class Merging(ByteTokenizer):
        """``><`` is one token."""

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            pieces = text.split("><")
            ids = super().encode(pieces[0], add_special_tokens=add_special_tokens)
            for piece in pieces[1:]:
                ids += [299, *super().encode(piece, add_special_tokens=False)]
            return ids

    asked = {
        "prompt": "<|image_1|><|image_2|>",
        "multi_modal_data": {"image": [picture(1), picture(2)]},
        "mm_processor_kwargs": {"whole": True},
    }
    process = processor(image=OPTIONALLY_WHOLE, tokenizer=Merging()).process
    with pytest.raises(RequestError, match="line break or a space"):
        process(asked)
    assert process({**asked, "prompt": "<|image_1|> <|image_2|>"}).token_ids == [
        *[BOS, *expanded(1)],
        *[*b" ", *expanded(2)],
    ]


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ([], "empty"),
        ("", "empty"),
        ([1, 300], "token id 300 is out of vocabulary; expected 0 to 299"),
        ([1, -1], "token id -1"),
        ([1.5], "list of token ids"),
        (7, "expected a text"),
        (None, "expected"),
        ({}, "neither"),
        ({"prompt": 7}, "int; expected a string"),
        ({"promt": "x"}, "did you mean 'prompt'?"),
        ({"prompt": "x", "multi_modal_data": [1]}, "expected a dict"),
        ({"prompt": "x", "multi_modal_data": {"images": []}}, "did you mean 'image'?"),
        ({"prompt": "x", "multi_modal_data": {"audio": b"x"}}, "unknown 'audio'; accepted: image, video"),
        ({"prompt": "x", "mm_processor_kwargs": {"repeats": 2}}, "did you mean 'repeat'?"),
        ({"prompt": "x", "cache_salt": 1}, "expected a string"),
    ],
)
def test_malformed_prompts_are_refused(prompt: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=re.escape(complaint)):
        processor().process(prompt)


# --- limits ---------------------------------------------------------------------------------------


def test_limits_are_the_familys_unless_the_user_says_otherwise() -> None:
    spec = ModelSpec(architecture="Toy", build=lambda context: None, default_limits={"image": 1})  # type: ignore[arg-type,return-value]
    two = {"prompt": "<img><img>", "multi_modal_data": {"image": [b"never decoded"] * 2}}
    with pytest.raises(
        MediaError, match=r"At most 1 image\(s\) may be provided in one request. This one has 2"
    ) as caught:
        processor(model_spec=spec).process(two)
    assert "limit_mm_per_prompt={'image': 2}" in str(caught.value)
    good = {**two, "multi_modal_data": {"image": [picture(1)] * 2}}
    assert len(processor(model_spec=spec, limits={"image": 2}).process(good).media) == 2
    with pytest.raises(ConfigError, match="did you mean 'image'"):
        processor(limits={"images": 2})
    with pytest.raises(ConfigError, match="unknown 'max_pixel'"):
        processor(options={"max_pixel": 2})
    with pytest.raises(ConfigError, match="must register both"):
        processor(placeholders={"image": WHOLE})


def test_the_context_must_hold_the_expanded_prompt_and_a_new_token() -> None:
    asked = {"prompt": "<img>", "multi_modal_data": {"image": picture(7)}}  # 1 + 2 + 7 tokens
    assert len(processor(max_model_len=11).process(asked).token_ids) == 10
    with pytest.raises(
        PromptTooLongError, match=r"has 10 tokens \(7 of them for media\); the context holds 10"
    ):
        processor(max_model_len=10).process(asked)
    assert len(processor(max_model_len=10).process(asked, min_new_tokens=0).token_ids) == 10


def test_one_bad_item_is_named_by_its_number() -> None:
    good = picture(1)
    for bad, complaint in [
        (b"nonsense", "image 2: the image cannot be read"),
        (picture(200), "image 2: this picture is too bright"),
        (
            torch.ones(1, HIDDEN + 1),
            rf"image 2: the embeddings have shape \(1, 5\); expected \(tokens, {HIDDEN}\)",
        ),
    ]:
        data = {"image": [good, bad if isinstance(bad, (bytes, np.ndarray)) else {"rows": [bad]}]}
        with pytest.raises(MediaError, match=complaint):
            processor().process({"prompt": "<img><img>", "multi_modal_data": data})
    with pytest.raises(MediaError, match="image 1: 2x3 pixels are too many|image 1: 3x2 pixels are too many"):
        processor(media_limits=MediaLimits(max_image_pixels=5)).process(
            {"prompt": "<img>", "multi_modal_data": {"image": good}}
        )


def test_a_placeholder_that_does_not_fit_its_item_is_caught_before_scheduling() -> None:
    def too_few(mapped: MappedMedia, number: int) -> Expansion:
        return Expansion(token_ids=[FILL], is_embed=[True])

    def crooked(mapped: MappedMedia, number: int) -> Expansion:
        return Expansion(token_ids=[FILL], is_embed=[True, True])

    asked = {"prompt": "<img>", "multi_modal_data": {"image": picture(2)}}
    for wrong, complaint in [
        (too_few, "2 embeddings for 1 embed tokens"),
        (crooked, "plugin of Toy is at fault"),
    ]:
        with pytest.raises(MediaError, match=complaint):
            processor(image=Placeholder(text=WHOLE.text, expand=wrong, token_id=IMAGE)).process(asked)


# --- media ----------------------------------------------------------------------------------------


def test_embeddings_are_taken_as_tensor_list_or_dict_and_mixed_with_pictures() -> None:
    rows = torch.rand(2, 3, HIDDEN)
    for data in (rows, list(rows), {"rows": rows}, [{"rows": rows[:1]}, {"rows": rows[1:]}]):
        result = processor().process({"prompt": "<img><img>", "multi_modal_data": {"image": data}})
        for item, expected in zip(result.media, rows):
            assert item.mapped.embeds is not None
            assert torch.equal(item.mapped.embeds, expected)
    mixed = [picture(1), {"rows": rows[:1]}]
    result = processor().process({"prompt": "<img><img>", "multi_modal_data": {"image": mixed}})
    assert [sum(item.is_embed) for item in result.media] == [1, 3]
    with pytest.raises(MediaError, match="expected a dict with rows"):
        processor().process({"prompt": "<img>", "multi_modal_data": {"image": {"embeds": rows}}})
    with pytest.raises(MediaError, match="NaN"):
        processor().process({"prompt": "<img>", "multi_modal_data": {"image": rows[:1] * float("nan")}})


def test_a_list_of_frames_is_one_video_and_a_list_of_videos_is_several() -> None:
    frames = [Image.fromarray(picture(2)), picture(2)]
    for data, count in [
        (frames, 1),
        ([frames], 1),
        ([frames, np.stack([picture(3)] * 2)], 2),
        (None, 0),
        ([], 0),
    ]:
        result = processor().process({"prompt": "!" + "(clip)" * count, "multi_modal_data": {"video": data}})
        assert len(result.media) == count


def test_equal_items_are_mapped_once_and_options_tell_them_apart() -> None:
    mapper = Mapper()
    process = processor(mapper=mapper, options={"repeat": 2})
    asked = {"prompt": "<img><img>", "multi_modal_data": {"image": [picture(1), picture(1)]}}
    first, second = process.process(asked).media
    assert first.key == second.key
    assert len(mapper.calls) == 1
    other = process.process({**asked, "mm_processor_kwargs": {"repeat": 3}}).media
    assert [sum(item.is_embed) for item in (*other, first)] == [3, 3, 2]
    assert other[0].key != first.key
    assert len(mapper.calls) == 2
    assert (process.mapped_media.queries, process.mapped_media.hits) == (4, 2)


def test_what_another_request_is_just_mapping_is_waited_for() -> None:
    mapper = Mapper()
    mapper.gate.clear()
    process = processor(mapper=mapper)
    asked = {"prompt": "<img>", "multi_modal_data": {"image": picture(5)}}
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(process.process, asked) for _ in range(4)]
        while process.mapped_media.queries < 4:  # all four have looked for it in vain
            threading.Event().wait(0.001)
        mapper.gate.set()
        results = [future.result() for future in futures]
    assert len(mapper.calls) == 1
    assert len({id(result.media[0].mapped) for result in results}) == 1


def test_a_failure_reaches_all_who_wait_and_is_tried_again_by_the_next() -> None:
    mapper = Mapper()
    mapper.gate.clear()
    process = processor(mapper=mapper)
    asked = {"prompt": "<img>", "multi_modal_data": {"image": picture(200)}}
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(process.process, asked) for _ in range(2)]
        while process.mapped_media.queries < 2:
            threading.Event().wait(0.001)
        mapper.gate.set()
        for future in futures:
            with pytest.raises(MediaError, match="image 1: this picture is too bright"):
                future.result()
    with pytest.raises(MediaError, match="too bright"):
        process.process(asked)
    assert len(mapper.calls) == 2


def test_a_modality_of_a_plugins_own_takes_ready_made_items() -> None:
    sound = Placeholder(text=lambda n: "(sound)", expand=expand)
    process = processor(mappers={"sound": Mapper()}, placeholders={"sound": sound}).process
    item = MediaItem(modality="sound", digest="d", pixels=np.full((1, 1, 3), 4, np.uint8))
    result = process({"prompt": "(sound)", "multi_modal_data": {"sound": item}})
    assert sum(result.media[0].is_embed) == 4
    with pytest.raises(MediaError, match="sound 1: got a bytes"):
        process({"prompt": "(sound)", "multi_modal_data": {"sound": b"RIFF"}})


# --- the rest of a processed prompt ---------------------------------------------------------------


def test_positions_are_the_models_and_the_salt_is_the_requests() -> None:
    seen: list[tuple[Any, ...]] = []

    def positions(config: Mapping[str, Any], ids: Sequence[int], media: Sequence[PlacedMedia]) -> Positions:
        seen.append((config, list(ids), [item.start for item in media]))
        return Positions(prompt=np.zeros((3, len(ids)), np.int64), delta=-1)

    spec = ModelSpec(architecture="Toy", build=lambda context: None, positions=positions)  # type: ignore[arg-type,return-value]
    process = processor(model_spec=spec, config={"a": 1}).process
    asked = {"prompt": "x<img>", "multi_modal_data": {"image": picture(1)}, "cache_salt": "tenant"}
    result = process(asked)
    assert result.positions is not None
    assert result.positions.delta == -1
    assert seen == [({"a": 1}, [BOS, *b"x", *expanded(1)], [2])]
    assert (result.salt, process("x").salt) == ("tenant", "")
    assert processor().process("x").positions is None
