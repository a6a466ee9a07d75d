"""Draws what scenes consist of: shapes, backgrounds on which they stand out, numbers in four typefaces."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Size = tuple[int, int]
"""Width and height in pixels, as Pillow has it."""

COLOURS: dict[str, RGB] = {
    "red": (215, 30, 35),
    "green": (30, 150, 50),
    "blue": (35, 70, 215),
    "yellow": (245, 220, 40),
    "orange": (245, 130, 20),
    "purple": (135, 40, 170),
    "white": (248, 248, 248),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SUPERSAMPLING = 4
CLEAR_CONTRAST = 105.0
"""Least distance in RGB between a shape's colour and the background: below it the eye hesitates."""


@dataclass(frozen=True)
class Mark:
    """Where something was drawn: its centre in pixels, and what it is."""

    x: float
    y: float
    name: str
    colour: str
    way: str = ""


@dataclass(frozen=True)
class Item:
    """A shape on the picture; centre and radius in pixels, turn in radians."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float
    paint: RGB

    def moved(self, dx: float, dy: float) -> Item:
        return Item(self.shape, self.colour, self.x + dx, self.y + dy, self.radius, self.turn, self.paint)

    def mark(self, way: str = "") -> Mark:
        return Mark(self.x, self.y, self.shape, self.colour, way)

    def touches(self, other: Item, gap: float = 3.0) -> bool:
        return math.hypot(self.x - other.x, self.y - other.y) < self.radius + other.radius + gap


def _polygon(shape: str, turn: float) -> list[tuple[float, float]]:
    """Corners in the unit circle."""
    if shape == "square":
        angles = [math.pi / 4 + i * math.pi / 2 for i in range(4)]
        points = [(math.cos(a), math.sin(a)) for a in angles]
    elif shape == "triangle":
        angles = [-math.pi / 2 + i * 2 * math.pi / 3 for i in range(3)]
        points = [(math.cos(a), math.sin(a)) for a in angles]
    elif shape == "star":
        angles = [-math.pi / 2 + i * math.pi / 5 for i in range(10)]
        points = [
            (math.cos(a) * (1, 0.42)[i % 2], math.sin(a) * (1, 0.42)[i % 2]) for i, a in enumerate(angles)
        ]
    else:
        a, b = 0.95, 0.31
        points = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b)]
        points += [(-a, -b), (-b, -b)]
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def draw_item(canvas: Image.Image, item: Item) -> None:
    """Pastes one shape with smooth edges."""
    left, top = math.floor(item.x - item.radius) - 1, math.floor(item.y - item.radius) - 1
    side = math.ceil(2 * item.radius) + 3
    mask = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    pen = ImageDraw.Draw(mask)
    cx, cy = (item.x - left) * SUPERSAMPLING, (item.y - top) * SUPERSAMPLING
    r = item.radius * SUPERSAMPLING
    if item.shape in ("circle", "ring"):
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        if item.shape == "ring":
            hole = 0.55 * r
            pen.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=0)
    else:
        pen.polygon([(cx + r * x, cy + r * y) for x, y in _polygon(item.shape, item.turn)], fill=255)
    canvas.paste(item.paint, (left, top), mask.reduce(SUPERSAMPLING))


def _muted(rng: random.Random) -> np.ndarray:
    """A background colour: any hue, never as vivid as a shape."""
    grey = rng.uniform(45, 215)
    return np.clip([grey + rng.uniform(-38, 38) for _ in range(3)], 0, 255)


def draw_background(rng: random.Random, size: Size) -> tuple[Image.Image, list[np.ndarray]]:
    """A plain, shaded, striped, chequered or noisy background, and the colours that it is made of."""
    width, height = size
    first = _muted(rng)
    second = np.clip(first + [rng.uniform(-34, 34) for _ in range(3)], 0, 255)
    style = rng.choice(("solid", "gradient", "stripes", "checks", "noise", "blotches"))
    if style == "solid":
        return Image.new("RGB", size, tuple(int(v) for v in first)), [first]
    y, x = np.ogrid[0:height, 0:width]
    if style == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        ramp = x * (math.cos(angle) / width) + y * (math.sin(angle) / height)
        mix = (ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6)
    elif style == "stripes":
        angle, period = rng.uniform(0, math.pi), rng.uniform(6, 30)
        mix = ((x * math.cos(angle) + y * math.sin(angle)) % period < period / 2).astype(np.float32)
    elif style == "checks":
        cell = rng.randint(4, 20)
        mix = ((x // cell + y // cell) % 2).astype(np.float32)
    else:
        dice = np.random.default_rng(rng.getrandbits(32))
        if style == "noise":
            mix = dice.random((height, width), dtype=np.float32)
        else:
            coarse = Image.fromarray(dice.integers(0, 256, (5, 5), dtype=np.uint8))
            mix = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
    pixels = first + mix[..., None].astype(np.float32) * (second - first).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), [first, second, (first + second) / 2]


def _clear_colours(backdrop: Sequence[np.ndarray]) -> list[str]:
    return [
        name
        for name, value in COLOURS.items()
        if all(float(np.linalg.norm(np.asarray(value) - colour)) > CLEAR_CONTRAST for colour in backdrop)
    ]


def backdrop(rng: random.Random, size: Size, colours: int) -> tuple[Image.Image, list[str]]:
    """A background on which at least so many colours stand out, and those colours in random order."""
    while True:
        canvas, backdrop = draw_background(rng, size)
        clear = _clear_colours(backdrop)
        if len(clear) >= colours:
            rng.shuffle(clear)
            return canvas, clear


def paint(rng: random.Random, colour: str) -> RGB:
    """A colour as it is drawn: not always the same."""
    r, g, b = (min(255, max(0, v + rng.randint(-10, 10))) for v in COLOURS[colour])
    return r, g, b


def make_item(rng: random.Random, shape: str, colour: str, x: float, y: float, radius: float) -> Item:
    """A shape, a little turned and in a paint of its colour."""
    return Item(shape, colour, x, y, radius, rng.uniform(-0.25, 0.25), paint(rng, colour))


def _side(rng: random.Random, low: int, high: int) -> int:
    """Mostly small sides: the smaller of two draws."""
    return min(rng.randint(low, high), rng.randint(low, high))


def size_or_drawn(rng: random.Random, size: Size | None, low: int, high: int) -> Size:
    """The size that is given, or one whose sides lie within these bounds."""
    return size or (_side(rng, low, high), _side(rng, low, high))


SEGMENTS = {
    "0": "abcdef", "1": "bc", "2": "abged", "3": "abgcd", "4": "fgbc",
    "5": "afgcd", "6": "afgedc", "7": "abc", "8": "abcdefg", "9": "abcdfg",
}  # fmt: skip
SEGMENT_LINES = {
    "a": (0, 0, 1, 0), "b": (1, 0, 1, 1), "c": (1, 1, 1, 2), "d": (0, 2, 1, 2),
    "e": (0, 1, 0, 2), "f": (0, 0, 0, 1), "g": (0, 1, 1, 1),
}  # fmt: skip


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _segment_mask(digits: str, thick: float) -> Image.Image:
    """Digits as a pocket calculator shows them, 160 high."""
    thickness, wide, tall, step = round(160 * thick), 70, 160, 112
    mask = Image.new("L", (step * len(digits) - step + wide + thickness, tall + thickness))
    pen = ImageDraw.Draw(mask)
    for i, digit in enumerate(digits):
        for segment in SEGMENTS[digit]:
            x0, y0, x1, y1 = SEGMENT_LINES[segment]
            half = thickness // 2
            box = (x0 * wide + i * step, y0 * tall // 2, x1 * wide + i * step, y1 * tall // 2)
            pen.rectangle((box[0], box[1], box[2] + 2 * half, box[3] + 2 * half), fill=255)
    return mask


def digits_mask(rng: random.Random, digits: str) -> tuple[Image.Image, list[float]]:
    """The number in some typeface, tightly cut, and the middle of each digit as a share of the width."""
    face = rng.choice(("plain", "bold", "segments", "pixels"))
    if face == "segments":
        mask = _segment_mask(digits, rng.uniform(0.11, 0.17))
        middles = [112 * i + 45.0 for i in range(len(digits))]
    elif face == "pixels":
        small = ImageFont.load_default_imagefont()
        box = small.getbbox(digits)
        mask = Image.new("L", (int(box[2]), int(box[3])))
        ImageDraw.Draw(mask).text((0, 0), digits, fill=255, font=small)
        mask = mask.resize((mask.width * 12, mask.height * 12), Image.Resampling.NEAREST)
        middles = [mask.width * (i + 0.5) / len(digits) for i in range(len(digits))]
    else:
        size, stroke = 120, 0 if face == "plain" else rng.randint(4, 8)
        box = _font(size).getbbox(digits, stroke_width=stroke)
        mask = Image.new("L", (int(box[2]) + 2, int(box[3]) + 2))
        ImageDraw.Draw(mask).text((0, 0), digits, fill=255, font=_font(size), stroke_width=stroke)
        middles = [mask.width * (i + 0.5) / len(digits) for i in range(len(digits))]
    box = mask.getbbox() or (0, 0, *mask.size)
    return mask.crop(box), [(middle - box[0]) / (box[2] - box[0]) for middle in middles]
