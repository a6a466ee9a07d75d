"""Draws the pictures that the demonstration model is trained and tested on.

A scene is one picture, two pictures or a short video, together with every question that can be asked about
it. Everything follows from a kind and a seed, so a scene can be drawn again anywhere. Seeds are split into
ranges that never meet, which keeps an accuracy figure honest:

* below 2**40: training
* 2**40 to 2**41: validation while training
* 2**41 to 2**42: the held-out scenes that `evaluate.py` draws
* from 2**42: the fresh pictures of `run.py`
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from clutter import draw_clutter
from drawing import (
    COLOURS,
    SHAPES,
    Item,
    Mark,
    Size,
    backdrop,
    digits_mask,
    draw_background,
    draw_item,
    make_item,
    paint,
    size_or_drawn,
)
from PIL import Image

TRAINING_SEEDS = (0, 2**40)
VALIDATION_SEEDS = (2**40, 2**41)
HELD_OUT_SEEDS = (2**41, 2**42)
FRESH_SEEDS = (2**42, 2**43)

PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.26, 0.26),
    "top right": (0.74, 0.26),
    "centre": (0.5, 0.5),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
}
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
STILL = "it does not move"
NOTHING = "I see no shape I know."


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


@dataclass(frozen=True)
class Question:
    """One question about one scene, with the only answer that counts as right."""

    kind: str
    text: str
    answer: str
    images: tuple[Image.Image, ...] = ()
    frames: tuple[Image.Image, ...] = ()


@dataclass
class Scene:
    """What was drawn, and all that can be asked about it as (kind, text, answer)."""

    images: list[Image.Image] = field(default_factory=list)
    frames: list[Image.Image] = field(default_factory=list)
    questions: list[tuple[str, str, str]] = field(default_factory=list)
    marks: list[list[Mark]] = field(default_factory=list)
    """What there is to see on every picture or frame: training looks at it, answering does not."""
    single: list[list[tuple[str, str, str]]] = field(default_factory=list)
    """What can be asked about each picture while it is the last one shown."""


def _name(item: Item, items: Sequence[Item], rng: random.Random) -> str:
    """What to call an item so that only it can be meant."""
    short = sum(other.shape == item.shape for other in items) == 1
    return f"the {item.shape}" if short and rng.random() < 0.6 else f"the {item.colour} {item.shape}"


def _listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _sentence(parts: Sequence[str]) -> str:
    told = _listing(parts)
    return told[0].upper() + told[1:] + "."


def at(place: str) -> str:
    return "in the centre" if place == "centre" else f"at the {place}"


def objects_scene(rng: random.Random, size: Size | None = None, count: int | None = None) -> Scene:
    """One to four shapes, each in a corner or the centre: colour, shape, position, describe."""
    width, height = size_or_drawn(rng, size, 56, 224)
    count = count or rng.choice((1, 1, 2, 2, 3, 3, 4))
    canvas, colours = backdrop(rng, (width, height), count)
    chosen = rng.sample(list(PLACES), count)
    places = [place for place in PLACES if place in chosen]
    least = min(width, height)
    largest = 0.15 if count > 1 and "centre" in places else 0.2
    items: list[Item] = []
    for place, colour in zip(places, colours, strict=False):
        x, y = ((v + rng.uniform(-0.06, 0.06)) for v in PLACES[place])
        radius = max(7.0, rng.uniform(0.11, largest) * least)
        items.append(make_item(rng, rng.choice(SHAPES), colour, x * width, y * height, radius))
    for item in items:
        draw_item(canvas, item)

    ask: list[tuple[str, str, str]] = []
    for item, place in zip(items, places, strict=True):
        if sum(other.shape == item.shape for other in items) == 1:
            text = rng.choice(
                ("What colour is the {}?", "Which colour does the {} have?", "Tell me the colour of the {}.")
            )
            ask.append(("colour", text.format(item.shape), item.colour))
        text = rng.choice(("What colour is the shape {}?", "Which colour is {}?"))
        ask.append(("colour", text.format(at(place)), item.colour))
        text = rng.choice(("What shape is the {} object?", "Which shape is {}?", "What is the {} thing?"))
        ask.append(("shape", text.format(item.colour), item.shape))
        text = rng.choice(("What shape is {}?", "Which shape is {}?"))
        ask.append(("shape", text.format(at(place)), item.shape))
        text = rng.choice(("Where is {}?", "In which part of the picture is {}?", "Where do you see {}?"))
        ask.append(("position", text.format(_name(item, items, rng)), place))
    if count == 1:
        ask.append(
            ("colour", rng.choice(("What colour is it?", "What colour is the shape?")), items[0].colour)
        )
        ask.append(("shape", rng.choice(("What shape is it?", "What shape is this?")), items[0].shape))
        ask.append(("position", rng.choice(("Where is it?", "Where is the shape?")), places[0]))
    if count <= 3:
        parts = [f"{with_article(i.colour)} {i.shape} {at(p)}" for i, p in zip(items, places, strict=True)]
        text = rng.choice(("Describe the picture.", "What is in the picture?", "What do you see?"))
        ask.append(("describe", text, _sentence(parts)))
    return Scene(images=[canvas], questions=ask, marks=[[item.mark() for item in items]])


def _scatter(rng: random.Random, size: Size, wanted: Sequence[str]) -> tuple[Image.Image, list[Item]]:
    """Shapes of random colours at random places, none touching another. Leaves none out."""
    width, height = size
    canvas, colours = backdrop(rng, size, 3)
    colours = colours[: rng.randint(1, 3)]
    least = min(size)
    while True:
        items: list[Item] = []
        for shape in wanted:
            for _ in range(40):
                radius = rng.uniform(max(7.5, 0.075 * least), max(9.0, 0.115 * least))
                x = rng.uniform(radius + 1, width - radius - 1)
                y = rng.uniform(radius + 1, height - radius - 1)
                item = make_item(rng, shape, rng.choice(colours), x, y, radius)
                if not any(item.touches(other) for other in items):
                    items.append(item)
                    break
        if len(items) == len(wanted):
            break
    for item in items:
        draw_item(canvas, item)
    return canvas, items


def _room(size: Size, most: int) -> int:
    """How many shapes fit on a picture without crowding."""
    return min(most, size[0] * size[1] // 800)


def count_scene(rng: random.Random, size: Size | None = None) -> Scene:
    """Nought to six shapes of a kind among others: count."""
    size = size_or_drawn(rng, size, 84, 224)
    most = _room(size, 7)
    kinds = rng.sample(SHAPES, 3)
    main = rng.randint(0, min(6, most))
    wanted = [kinds[0]] * main
    for kind in kinds[1:]:
        wanted += [kind] * rng.randint(0, min(3, most - len(wanted)))
    canvas, items = _scatter(rng, size, wanted)

    def text(things: str) -> str:
        return rng.choice(
            (
                "How many {} are there?",
                "How many {} do you see?",
                "Count the {}.",
                "How many {} are in the picture?",
            )
        ).format(things)

    ask = [("count", text(plural(kind)), str(wanted.count(kind))) for kind in kinds]
    ask.append(("count", text("shapes"), str(len(items))))
    return Scene(images=[canvas], questions=ask, marks=[[item.mark() for item in items]])


def compare_scene(rng: random.Random, size: Size | None = None, second: Size | None = None) -> Scene:
    """Two pictures with nought to four shapes of one kind in each: compare."""
    sizes = [size_or_drawn(rng, size, 84, 168), size_or_drawn(rng, second or size, 84, 168)]
    kind, other = rng.sample(SHAPES, 2)
    counts = [rng.randint(0, 4), rng.randint(0, 4)]
    if rng.random() < 0.25:
        counts[1] = counts[0]
    extra = [rng.randint(0, 2), rng.randint(0, 2)]
    drawn = []
    for where, n, more in zip(sizes, counts, extra, strict=True):
        drawn.append(_scatter(rng, where, [kind] * n + [other] * more))

    def verdict(numbers: Sequence[int]) -> str:
        if numbers[0] == numbers[1]:
            return "the same"
        return "the first" if numbers[0] > numbers[1] else "the second"

    ask = []
    for shape, numbers in ((kind, counts), (other, extra)):
        text = rng.choice(
            ("Which picture has more {}?", "Which picture shows more {}?", "Where are more {}?")
        )
        ask.append(("compare", text.format(plural(shape)), verdict(numbers)))
    totals = [a + b for a, b in zip(counts, extra, strict=True)]
    ask.append(("compare", "Which picture has more shapes?", verdict(totals)))
    for i, ordinal in enumerate(("first", "second")):
        text = rng.choice(("How many {} are in the {} picture?", "How many {} does the {} picture have?"))
        ask.append(("count in one of two", text.format(plural(kind), ordinal), str(counts[i])))
    marks = [[item.mark() for item in items] for _, items in drawn]
    return Scene(images=[canvas for canvas, _ in drawn], questions=ask, marks=marks)


def number_scene(rng: random.Random, size: Size | None = None) -> Scene:
    """A number of one to three digits: number."""
    size = size_or_drawn(rng, size, 56, 196)
    width, height = size
    canvas, colours = backdrop(rng, size, 1)
    length = min(rng.choice((1, 2, 2, 3, 3, 3)), width // 28)
    digits = str(rng.randint(10 ** (length - 1) if length > 1 else 0, 10**length - 1))
    mask, middles = digits_mask(rng, digits)
    fit = min(0.9 * width / mask.width, 0.85 * height / mask.height)
    tall = min(fit * mask.height, max(24.0, rng.uniform(0.4, 0.85) * height), 90.0)
    scale = tall / mask.height
    box = max(1, round(mask.width * scale)), max(1, round(mask.height * scale))
    mask = mask.resize(box, Image.Resampling.BOX)
    left, top = rng.randint(2, max(2, width - box[0] - 2)), rng.randint(2, max(2, height - box[1] - 2))
    canvas.paste(paint(rng, colours[0]), (left, top), mask)
    text = rng.choice(
        (
            "What number is this?",
            "Which number do you see?",
            "Read the number.",
            "What number is in the picture?",
        )
    )
    return Scene(
        images=[canvas],
        questions=[
            ("number", text, digits),
            ("colour of the number", "What colour is the number?", colours[0]),
            ("describe a number", "What is in the picture?", f"The number {digits} in {colours[0]}."),
        ],
        marks=[
            [
                Mark(left + middle * box[0], top + box[1] / 2, digit, colours[0])
                for middle, digit in zip(middles, digits, strict=True)
            ]
        ],
    )


def motion_scene(
    rng: random.Random, size: Size | None = None, frames: int | None = None, count: int | None = None
) -> Scene:
    """A video of four to eight frames in which a shape moves, with or without a second shape: motion.

    One with a single shape is also described.
    """
    size = size_or_drawn(rng, size, 56, 140)
    length = frames or rng.choice((4, 4, 5, 6, 6, 7, 8))
    count = count or rng.choice((1, 2))
    canvas, colours = backdrop(rng, size, count)
    ways: list[str] = []
    items: list[Item] = []
    travels: list[tuple[float, float]] = []
    while len(items) < count:
        items, travels, ways = [], [], []
        shapes = rng.sample(SHAPES, count)
        for i in range(count):
            still = i > 0 and rng.random() < 0.3
            way = rng.choice(list(DIRECTIONS))
            radius = max(7.0, rng.uniform(0.1, 0.15) * min(size))
            spans = [
                0.0 if still else d * rng.uniform(0.28, 0.5) * s
                for d, s in zip(DIRECTIONS[way], size, strict=True)
            ]
            start = [
                rng.uniform(radius + 1 + max(0.0, -span), s - radius - 1 - max(0.0, span))
                for span, s in zip(spans, size, strict=True)
            ]
            item = make_item(rng, shapes[i], colours[i], start[0], start[1], radius)
            ends = [item.moved(spans[0] * t / 7, spans[1] * t / 7) for t in range(8)]
            if items:
                others = [items[0].moved(travels[0][0] * t / 7, travels[0][1] * t / 7) for t in range(8)]
                if any(a.touches(b) for a, b in zip(ends, others, strict=True)):
                    break
            items.append(item)
            travels.append((spans[0], spans[1]))
            ways.append(STILL if still else way)
    film, marks = [], []
    for t in range(length):
        frame = canvas.copy()
        for item, (dx, dy) in zip(items, travels, strict=True):
            draw_item(frame, item.moved(dx * t / (length - 1), dy * t / (length - 1)))
        film.append(frame)
        marks.append(
            [
                item.moved(dx * t / (length - 1), dy * t / (length - 1)).mark(way)
                for item, (dx, dy), way in zip(items, travels, ways, strict=True)
            ]
        )
    ask = []
    for item, way in zip(items, ways, strict=True):
        text = rng.choice(
            ("Which way does {} move?", "In which direction does {} move?", "Which way is {} going?")
        )
        ask.append(("motion", text.format(_name(item, items, rng)), way))
        ask.append(("colour in a video", f"What colour is the {item.shape}?", item.colour))
    if count == 1:
        told = f"{with_article(items[0].colour)} {items[0].shape} moves {ways[0]}"
        ask.append(("describe a video", "Describe the video.", _sentence([told])))
    return Scene(frames=film, questions=ask, marks=marks)


def film_scene(rng: random.Random, size: Size | None = None, frames: int | None = None) -> Scene:
    """Frames of a video as single pictures, with one shape that moves: describe frames."""
    scene = motion_scene(rng, size, frames or rng.choice((3, 4, 4, 5)), count=1)
    marks = [[Mark(mark.x, mark.y, mark.name, mark.colour) for mark in frame] for frame in scene.marks]
    names = {"describe a video": "describe frames", "motion": "motion in frames"}
    ask = [(names[kind], text, answer) for kind, text, answer in scene.questions if kind in names]
    return Scene(images=scene.frames, questions=ask, marks=marks)


def pair_scene(rng: random.Random, size: Size | None = None, second: Size | None = None) -> Scene:
    """Two pictures with one shape each: describe each."""
    parts = [objects_scene(rng, size, 1), objects_scene(rng, second or size, 1)]
    ask: list[tuple[str, str, str]] = []
    for part, ordinal in zip(parts, ("first", "second"), strict=True):
        mark = part.marks[0][0]
        ask.append(("colour of one", f"What colour is the shape in the {ordinal} picture?", mark.colour))
        ask.append(("shape of one", f"What shape is in the {ordinal} picture?", mark.name))
    first, last = (f"{with_article(p.marks[0][0].colour)} {p.marks[0][0].name}" for p in parts)
    told = f"The first shows {first} and the second shows {last}."
    ask.append(("describe each", "Describe each picture.", told))
    return Scene(
        images=[part.images[0] for part in parts],
        questions=ask,
        marks=[part.marks[0] for part in parts],
        single=[part.questions for part in parts],
    )


def nothing_scene(rng: random.Random, size: Size | None = None) -> Scene:
    """A picture without any shape that the models know, which they are asked about all the same: nothing."""
    size = size_or_drawn(rng, size, 56, 224)
    canvas = draw_background(rng, size)[0] if rng.random() < 0.2 else draw_clutter(rng, size)
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    asked = (
        "Describe the picture.",
        "What is in the picture?",
        "What do you see?",
        "What shape is it?",
        "What shape is this?",
        f"What shape is the {colour} object?",
        f"What colour is the {shape}?",
        f"Where is the {shape}?",
        "Where is it?",
        "What number is this?",
        "What colour is the shape?",
    )
    ask = [("nothing", text, NOTHING) for text in asked[3:]]
    ask.append(("count of nothing", f"How many {plural(shape)} are there?", "0"))
    ask += [("nothing", text, NOTHING) for text in asked[:3]]
    return Scene(images=[canvas], questions=ask, marks=[[]])


SCENES: dict[str, Callable[..., Scene]] = {
    "objects": objects_scene,
    "count": count_scene,
    "number": number_scene,
    "compare": compare_scene,
    "motion": motion_scene,
    "film": film_scene,
    "pair": pair_scene,
    "nothing": nothing_scene,
}
KINDS: dict[str, str] = {
    "colour": "objects",
    "shape": "objects",
    "position": "objects",
    "describe": "objects",
    "count": "count",
    "number": "number",
    "compare": "compare",
    "motion": "motion",
    "describe a number": "number",
    "describe a video": "motion",
    "describe each": "pair",
    "describe frames": "film",
    "nothing": "nothing",
}
"""Question kinds, and the scene that each is asked about."""

SMALL_TALK: dict[str, str] = {
    "Hello": "Hello! Show me a picture.",
    "Hello!": "Hello! Show me a picture.",
    "Hi": "Hello! Show me a picture.",
    "Who are you?": "I am a tiny model that looks at pictures of shapes.",
    "What are you?": "I am a tiny model that looks at pictures of shapes.",
    "What can you do?": "I can name, count, find and compare shapes, read numbers and follow motion.",
    "Thank you": "You are welcome.",
    "Thank you!": "You are welcome.",
    "Goodbye": "Goodbye!",
    "Hey": "Hello! Show me a picture.",
    "hello": "Hello! Show me a picture.",
    "Thanks!": "You are welcome.",
    "What is in this image?": "Please show me a picture.",
    "What's in this image?": "Please show me a picture.",
    "Describe the picture.": "Please show me a picture.",
}


def make_scene(scene: str, seed: int, size: Size | None = None, **options: object) -> Scene:
    """Draws the scene that belongs to a seed."""
    return SCENES[scene](random.Random(f"{scene}/{seed}"), size, **options)


def make_question(kind: str, seed: int, size: Size | None = None) -> Question:
    """One question of a kind.

    A few scenes allow no question of the kind: then the next variation of the seed is drawn.
    """
    for attempt in range(100):
        rng = random.Random(f"{kind}/{seed}/{attempt}")
        scene = SCENES[KINDS[kind]](rng, size)
        fitting = [(text, answer) for k, text, answer in scene.questions if k == kind]
        if fitting:
            text, answer = rng.choice(fitting)
            return Question(kind, text, answer, tuple(scene.images), tuple(scene.frames))
    raise RuntimeError(f"no scene of seed {seed} allows a question of kind {kind}")
