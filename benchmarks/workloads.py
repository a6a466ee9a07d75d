"""The workloads: what is asked of both sides, and how it is made from a seed.

Requests are drawn afresh for every repetition of every workload, so that no cache carries anything from one
to the next: whatever a side saves, it saves within one repetition.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import synthetic

if TYPE_CHECKING:
    from PIL.Image import Image
    from tokenizers import Tokenizer

IMAGE_SIDE = 448
"""Pixels; a multiple of 28, so nothing is resized and the picture becomes 32 x 32 patches, 256 tokens."""

TEXT_TOKENS = (32, 48)
"""Least and most tokens of a prompt besides the picture's, chat template included; 40 on average."""

BEFORE_IMAGE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|>"
)
AFTER_IMAGE = "<|vision_end|>"
AFTER_QUESTION = "?<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One measurement.

    Attributes:
        name: as in ``--only``.
        title: for people.
        num_requests: submitted at once.
        new_tokens: generated for each, greedily; the end-of-sequence id is ignored.
        same_image: all requests ask about one picture.
        streamed: the time of every token is taken; else only the whole call's.
        system_tokens: length of a system prompt that all requests share; 0: the chat template's own.
    """

    name: str
    title: str
    num_requests: int
    new_tokens: int
    same_image: bool = False
    streamed: bool = False
    system_tokens: int = 0


WORKLOADS = (
    Workload(name="throughput", title="offline throughput", num_requests=16, new_tokens=64),
    Workload(name="latency", title="latency of one request", num_requests=1, new_tokens=64, streamed=True),
    Workload(
        name="shared", title="eight questions about one image", num_requests=8, new_tokens=24, same_image=True
    ),
)


def quick(workload: Workload) -> Workload:
    """A small version, for trying the benchmark out; its figures mean little."""
    return replace(
        workload,
        num_requests=min(workload.num_requests, 4),
        new_tokens=8,
        system_tokens=min(workload.system_tokens, 128),
    )


def warm_up(workload: Workload) -> Workload:
    """The same shapes with few tokens, run untimed first: libraries compile and allocate on first use."""
    return replace(workload, new_tokens=min(workload.new_tokens, 4))


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt with the family's placeholder in it, and its picture.

    Attributes:
        text: chat template applied, ``<|image_pad|>`` once.
        image: PIL, RGB.
    """

    text: str
    image: Image


def draw_requests(workload: Workload, seed: int, tokenizer: Tokenizer) -> list[Request]:
    """The requests of one repetition; equal arguments give equal requests, any others give different ones."""
    source = np.random.default_rng([synthetic.SEED, zlib.crc32(workload.name.encode()), seed])
    image = draw_image(source)
    before = BEFORE_IMAGE
    if workload.system_tokens:
        # Each of these words is one token after a space.
        words = source.choice(synthetic.WORDS, workload.system_tokens)
        before = before.replace("assistant.", f"assistant. {' '.join(words)}.", 1)
    requests: list[Request] = []
    texts: set[str] = set()
    while len(requests) < workload.num_requests:
        text = before + _draw_text(source, tokenizer).removeprefix(BEFORE_IMAGE)
        if text not in texts:  # equal requests would be shared without any merit
            texts.add(text)
            requests.append(Request(text=text, image=image if workload.same_image else draw_image(source)))
    return requests


def draw_image(source: np.random.Generator) -> Image:
    """A smooth random picture with noise on it."""
    from PIL import Image

    coarse = Image.fromarray(source.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy: np.ndarray[Any, Any] = smooth + source.integers(-12, 13, smooth.shape, dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _draw_text(source: np.random.Generator, tokenizer: Tokenizer) -> str:
    wanted = int(source.integers(TEXT_TOKENS[0], TEXT_TOKENS[1] + 1))
    question = ""
    while True:
        text = BEFORE_IMAGE + AFTER_IMAGE + question + AFTER_QUESTION
        if len(tokenizer.encode(text).ids) - 1 >= wanted:  # less the placeholder
            return text
        question += " " + synthetic.WORDS[source.integers(len(synthetic.WORDS))]


def image_patches() -> int:
    """Patches of one picture: rows that go through the vision tower."""
    return int((IMAGE_SIDE // synthetic.PREPROCESSOR["patch_size"]) ** 2)


def image_tokens() -> int:
    """Tokens of one picture in the prompt."""
    return int(image_patches() // synthetic.PREPROCESSOR["merge_size"] ** 2)
