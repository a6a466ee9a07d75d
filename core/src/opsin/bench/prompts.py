"""Requests of a benchmark: drawn pictures or those of a folder, and questions of a given length."""

from __future__ import annotations

import base64
import io
import mimetypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from opsin.bench.settings import PromptSettings

if TYPE_CHECKING:
    from PIL.Image import Image

Conversation = list[dict[str, Any]]

WORDS = tuple(
    """
    what which where how many is the of in on near left right above below picture image colour shape
    number line point light side person animal plant house water sky road table window door sign letter
    word describe count compare name find read tell between behind before after first second third and
    or not
    """.split()  # noqa: SIM905
)
"""Short common words: most tokenizers have them whole."""

_DRAWN_FORMAT = "PNG"
_COARSE = 8


class Prompts:
    """Makes requests; equal settings, seeds and numbers give equal ones, others give different ones."""

    def __init__(
        self, settings: PromptSettings, seed: int, count_tokens: Callable[[str], int] | None = None
    ) -> None:
        """Draw what all requests share.

        Args:
            settings: of the requests.
            seed: of what is drawn.
            count_tokens: how many tokens a text has; None: a word counts as one.
        """
        self.settings = settings
        self.seed = seed
        self._count = count_tokens
        self._prefix = self._text(self._source(0), settings.prefix_len) if settings.prefix_len else ""

    def conversation(self, number: int, *, as_urls: bool = False) -> Conversation:
        """Request number ``number``, from 0 on.

        Args:
            number: which.
            as_urls: drawn pictures as ``data:`` URLs, as a server takes them, else as PIL images. Those of
                a folder are always URLs.
        """
        source = self._source(1 + number)
        text = self._text(source, self.settings.input_len)
        shown = 0 if self.settings.same_image else number
        parts = [
            self._picture(shown * self.settings.num_images + i, as_urls)
            for i in range(self.settings.num_images)
        ]
        content = [*parts, {"type": "text", "text": text}]
        messages: Conversation = [{"role": "user", "content": content}]
        return [{"role": "system", "content": self._prefix}, *messages] if self._prefix else messages

    def _source(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number])

    def _text(self, source: np.random.Generator, length: int) -> str:
        words = [str(word) for word in source.choice(WORDS, length)]
        if self._count is None:
            return " ".join(words)
        # A word is a token or more, so the text of so many words is long enough.
        low, high = 1, len(words)
        while low < high:  # the fewest words that have enough tokens
            middle = (low + high) // 2
            if self._count(" ".join(words[:middle])) < length:
                low = middle + 1
            else:
                high = middle
        return " ".join(words[:low])

    def _picture(self, number: int, as_url: bool) -> dict[str, Any]:
        files = self.settings.files
        if files:
            file = files[number % len(files)]
            # As encoded bytes: to decode them is part of a request's work.
            return _url(mimetypes.guess_type(file.name)[0] or "image/png", file.read_bytes())
        # Numbers of their own: no request's picture depends on how long the texts are.
        image = drawn(np.random.default_rng([self.seed, number, 1]), self.settings.size)
        if not as_url:
            return {"type": "image_pil", "image_pil": image}
        encoded = io.BytesIO()
        image.save(encoded, _DRAWN_FORMAT)
        return _url("image/png", encoded.getvalue())


def drawn(source: np.random.Generator, size: tuple[int, int]) -> Image:
    """A smooth random picture with noise on it, ``size`` (width, height)."""
    from PIL import Image

    coarse = Image.fromarray(source.integers(0, 256, (_COARSE, _COARSE, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + source.integers(-12, 13, smooth.shape, dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _url(kind: str, data: bytes) -> dict[str, Any]:
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def conversations(prompts: Prompts, numbers: Sequence[int], *, as_urls: bool = False) -> list[Conversation]:
    """Several requests."""
    return [prompts.conversation(number, as_urls=as_urls) for number in numbers]
