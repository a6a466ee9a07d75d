"""The words that questions come in.

`scenes.py` asks every question in one of few ways. People ask in more: "image" or "photo" for "picture",
"color" for "colour", without the question mark, or as the pages and clients that they copy from do.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

PAGE = (
    "What is in this image?",
    "What is the content of this image?",
    "What's in this image?",
    "Describe this image.",
)
"""How vLLM's "Using VLMs" and OpenAI's guide to vision ask about one picture."""
PAGE_EACH = (
    "What is the content of each image?",
    "What's in these images?",
    "What is in each image?",
    "Describe each image.",
)
PAGE_FILM = (
    "Describe this set of frames. Consider the frames to be a part of the same video.",
    "Describe this set of frames.",
)

DESCRIBE = (
    *PAGE,
    "What do you see in this image?",
    "What does the picture show?",
    "What is shown in this picture?",
    "What is in the photo?",
    "What is on the picture?",
    "Describe the picture in detail.",
    "Please describe this image.",
    "Can you describe the image?",
    "What can you see?",
    "What's this?",
)
DESCRIBE_EACH = (
    *PAGE_EACH,
    "Describe the pictures.",
    "What is in the pictures?",
    "Describe each picture.",
    "What do the two pictures show?",
    "What's in each picture?",
)
DESCRIBE_FILM = (
    *PAGE_FILM,
    "Describe the video.",
    "What happens in the video?",
    "What's happening in this video?",
    "Describe this video.",
    "What is the content of this video?",
)
NUMBER = (
    "What number is shown here?",
    "What number is in this image?",
    "Read the number in the picture.",
    "What does the picture say?",
    "Which number is this?",
)

OTHERS: Sequence[tuple[re.Pattern[str], Sequence[str]]] = [
    (
        re.compile(r"How many (\w+) are there\?"),
        (
            r"How many \1 can you see?",
            r"How many \1 are in this picture?",
            r"How many \1 does the picture show?",
            r"Count the \1 in this picture.",
        ),
    ),
    (re.compile(r"What colour is the (\w+)\?"), (r"What is the colour of the \1?",)),
    (re.compile(r"What shape is the (\w+) object\?"), (r"What is the shape of the \1 object?",)),
    (re.compile(r"Where is (the .+)\?"), (r"Where in the picture is \1?", r"Where can you see \1?")),
    (re.compile(r"Which way does (the .+) move\?"), (r"Where does \1 move?", r"How does \1 move?")),
    (re.compile(r"Which picture has more (\w+)\?"), (r"Which of the pictures has more \1?",)),
]
"""Questions of `scenes.py`, and what else they could be called."""

BY_KIND: Mapping[str, Sequence[str]] = {
    "describe": DESCRIBE,
    "describe a number": DESCRIBE,
    "describe each": DESCRIBE_EACH,
    "describe a video": DESCRIBE_FILM,
    "describe frames": DESCRIBE_FILM,
    "number": NUMBER,
}
"""Kinds of question that can be asked without naming anything on the picture."""


def american(text: str) -> str:
    """American spelling."""
    return text.replace("colour", "color").replace("Colour", "Color").replace("centre", "center")


def calling_it(noun: str) -> Callable[[str], str]:
    """A picture is called an image or a photo."""

    def call(text: str) -> str:
        return text.replace("picture", noun)

    return call


def casual(text: str) -> str:
    """Without a capital letter and without the mark at the end."""
    return text[0].lower() + text[1:].rstrip("?.")


def reworded(kind: str, text: str, rng: random.Random) -> str:
    """The question as somebody else would ask it: half of the time in the same words."""
    if kind in BY_KIND and rng.random() < 0.6:
        text = rng.choice(BY_KIND[kind])
    elif rng.random() < 0.4:
        for pattern, forms in OTHERS:
            if pattern.fullmatch(text):
                text = pattern.sub(rng.choice(list(forms)), text)
                break
    if rng.random() < 0.4:
        text = american(text)
    text = calling_it(rng.choices(("picture", "image", "photo"), (4, 4, 2))[0])(text)
    return casual(text) if rng.random() < 0.06 else text


Wording = Callable[[str, str, random.Random], str]
"""From the kind of a question, its text and a source of chance to the text that is asked."""


def _of_page(kind: str, text: str, rng: random.Random) -> str:
    """The page's own sentence where it has one for this kind, else the question about an image."""
    lines = {
        "describe": PAGE,
        "describe a number": PAGE,
        "nothing": PAGE,
        "describe each": PAGE_EACH,
        "describe a video": PAGE_FILM,
        "describe frames": PAGE_FILM,
    }
    return rng.choice(lines[kind]) if kind in lines else calling_it("image")(american(text))


WORDINGS: Mapping[str, Wording] = {
    "ours": lambda kind, text, rng: text,
    "American": lambda kind, text, rng: american(text),
    "image": lambda kind, text, rng: calling_it("image")(text),
    "photo": lambda kind, text, rng: calling_it("photo")(text),
    "the page's": _of_page,
    "casual": lambda kind, text, rng: casual(text),
}
"""The wordings that accuracy is measured for."""
