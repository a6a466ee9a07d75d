"""Pictures without any shape that the models know, as unlike flat drawings as photographs are.

The models learn from them to say so. No photograph is read: landscapes, textures, printed pages, blurred
heaps and cells are put together from noise, so what is said about real photographs is a fair test.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Size = tuple[int, int]
Field = np.ndarray
"""Grey values from 0 to 1: (height, width), float32."""


def _field(dice: np.random.Generator, size: Size, cells: tuple[int, int]) -> Field:
    """Smooth noise with so many hills across and down."""
    coarse = Image.fromarray(dice.random((max(2, cells[1]), max(2, cells[0])), dtype=np.float32))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)


def _fractal(dice: np.random.Generator, size: Size, roughness: float, first: int = 2) -> Field:
    """Noise of all scales: hills, hills on hills, down to the pixel."""
    total, share, cells = np.zeros((size[1], size[0]), np.float32), 1.0, first
    while cells < 2 * max(size):
        across = min(cells, size[0]), min(max(2, cells * size[1] // size[0]), size[1])
        total += share * (_field(dice, size, across) - 0.5)
        share, cells = share * roughness, cells * 2
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def _palette(rng: random.Random, mix: Field, colours: int = 4) -> np.ndarray:
    """A field in colours: (height, width, 3), 0 to 255."""
    hues = np.array([[rng.uniform(0, 255) for _ in range(3)] for _ in range(colours)])
    if rng.random() < 0.5:  # photographs are mostly dull
        grey = hues.mean(axis=1, keepdims=True)
        hues = grey + rng.uniform(0.0, 0.6) * (hues - grey)
    steps = np.linspace(0, 1, colours)
    return np.stack([np.interp(mix, steps, hues[:, channel]) for channel in range(3)], axis=-1)


def _hills(rng: random.Random, size: Size) -> np.ndarray:
    """A sky, and ridges in front of one another."""
    dice = np.random.default_rng(rng.getrandbits(32))
    width, height = size
    pixels = _palette(rng, np.linspace(0, 1, height)[:, None] + 0.15 * _fractal(dice, size, 0.5), 2)
    for layer in range(rng.randint(1, 4)):
        ridge = _fractal(dice, (width, 8), rng.uniform(0.3, 0.7), 2)[0]
        top = height * (0.25 + 0.18 * layer + rng.uniform(0.1, 0.5) * ridge)
        ground = _palette(rng, _fractal(dice, size, rng.uniform(0.5, 0.95)), 3)
        below = np.arange(height)[:, None] > top[None]
        pixels = np.where(below[..., None], ground, pixels)
    return pixels


def _clouds(rng: random.Random, size: Size) -> np.ndarray:
    dice = np.random.default_rng(rng.getrandbits(32))
    mix = _fractal(dice, size, rng.uniform(0.35, 0.95), rng.choice((2, 3, 5)))
    return _palette(rng, mix, rng.randint(2, 6))


def _texture(rng: random.Random, size: Size) -> np.ndarray:
    """Grass, gravel, cloth, planks: noise that is drawn out in one way, or laid in rows."""
    dice = np.random.default_rng(rng.getrandbits(32))
    width, height = size
    fine = rng.randint(6, 60), rng.randint(6, 60)
    mix = 0.6 * _field(dice, size, fine) + 0.4 * _fractal(dice, size, 0.8)
    if rng.random() < 0.4:
        rows, across = rng.randint(3, 9), rng.randint(2, 7)
        y, x = np.mgrid[0:height, 0:width]
        row = y * rows // height
        shifted = (x + (row % 2) * width // (2 * across)) * across / width
        joint = ((y * rows / height) % 1 < 0.14) | (shifted % 1 < 0.08)
        mix = np.where(joint, 0.15 * mix + rng.choice((0.0, 0.85)), mix)
    return _palette(rng, mix, rng.randint(2, 4))


def _heap(rng: random.Random, size: Size) -> np.ndarray:
    """Things of no name in front of one another, shaded, out of focus or sharp."""
    canvas = Image.fromarray(np.clip(_clouds(rng, size), 0, 255).astype(np.uint8))
    width, height = size
    for _ in range(rng.randint(2, 14)):
        thing = Image.fromarray(np.clip(_clouds(rng, size), 0, 255).astype(np.uint8))
        mask = Image.new("L", size)
        pen = ImageDraw.Draw(mask)
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        a = rng.uniform(0.05, 0.5) * width
        b = a * rng.uniform(0.25, 0.7) if rng.random() < 0.7 else a * rng.uniform(1.5, 3)
        sort = rng.random()
        if sort < 0.35:
            pen.ellipse((x - a, y - b, x + a, y + b), fill=255)
        elif sort < 0.55:
            pen.rectangle((x - a, y - b, x + a, y + b), fill=255)
        else:
            corners = sorted(rng.uniform(0, 2 * np.pi) for _ in range(rng.randint(5, 12)))
            reach = [rng.uniform(0.3, 1) for _ in corners]
            pen.polygon(
                [(x + a * r * np.cos(t), y + b * r * np.sin(t)) for t, r in zip(corners, reach, strict=True)],
                fill=255,
            )
        mask = mask.rotate(rng.uniform(0, 360), center=(x, y))
        mask = mask.filter(ImageFilter.GaussianBlur(rng.choice((0.5, 1, 2, 4, 8))))
        canvas.paste(thing, mask=mask)
    return np.asarray(canvas, dtype=np.float32)


def _walls(rng: random.Random, size: Size) -> np.ndarray:
    """Straight lines and boxes across each other: houses, shelves, screens."""
    canvas = Image.fromarray(np.clip(_clouds(rng, size), 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    width, height = size
    for _ in range(rng.randint(6, 60)):
        x, y = rng.uniform(-0.2, 1) * width, rng.uniform(-0.2, 1) * height
        w, h = rng.uniform(0.02, 0.5) * width, rng.uniform(0.02, 0.5) * height
        paint = tuple(int(v) for v in _palette(rng, np.array([[rng.random()]]))[0, 0])
        if rng.random() < 0.5:
            pen.rectangle((x, y, x + w, y + h), fill=paint)
        else:
            pen.line((x, y, x + rng.choice((-1, 1)) * w, y + h), fill=paint, width=rng.randint(1, 5))
    return np.asarray(canvas, dtype=np.float32)


def _page(rng: random.Random, size: Size) -> np.ndarray:
    """Lines of writing, unevenly lit."""
    dice = np.random.default_rng(rng.getrandbits(32))
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    height = rng.randint(8, 22)
    font = ImageFont.load_default(size=height)
    letters = "abcdefghijklmnopqrstuvwxyz"
    y = rng.uniform(-4, 8)
    while y < size[1]:
        line = " ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(14))
        pen.text((rng.uniform(-10, 12), y), line, fill=255, font=font)
        y += height * rng.uniform(1.1, 1.9)
    ink = np.asarray(mask.rotate(rng.gauss(0, 3)), dtype=np.float32)[..., None] / 255
    paper = _palette(rng, _field(dice, size, (3, 3)), 2)
    return paper + ink * (rng.choice((0, 0, 255)) - paper) * rng.uniform(0.5, 1)


def _cells(rng: random.Random, size: Size) -> np.ndarray:
    """A patchwork around scattered points: stones, leaves, tissue."""
    count = rng.randint(6, 90)
    dice = np.random.default_rng(rng.getrandbits(32))
    points = dice.random((count, 2), dtype=np.float32) * size
    y, x = np.mgrid[0 : size[1] : 2, 0 : size[0] : 2]
    far = (x[..., None] - points[:, 0]) ** 2 + (y[..., None] - points[:, 1]) ** 2
    near = np.sqrt(np.partition(far, 1, axis=-1)[..., :2])
    tints = _palette(rng, dice.random((1, count)), 5)[0][far.argmin(-1)]
    edge = np.clip((near[..., 1] - near[..., 0]) / rng.uniform(2, 14), 0, 1)[..., None]
    pixels = np.clip(tints * (0.3 + 0.7 * edge), 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)


def _specks(rng: random.Random, size: Size) -> np.ndarray:
    """Many small lights or grains on something dark or bright."""
    dice = np.random.default_rng(rng.getrandbits(32))
    pixels = _palette(rng, _fractal(dice, size, 0.4), 2) * rng.choice((0.15, 0.4, 1.0))
    for _ in range(rng.randint(30, 300)):
        x, y = int(dice.integers(size[0])), int(dice.integers(size[1]))
        r = int(rng.choice((0, 0, 0, 1, 1, 2)))
        pixels[max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1] = dice.random(3) * 255
    return pixels


def _silhouette(rng: random.Random, size: Size) -> np.ndarray:
    """The outline of something unknown, in two tones."""
    dice = np.random.default_rng(rng.getrandbits(32))
    hills = _fractal(dice, size, rng.uniform(0.2, 0.6), rng.choice((2, 3, 4)))
    edge = np.clip((hills - rng.uniform(0.4, 0.65)) * rng.choice((8, 40, 400)), 0, 1)
    return _palette(rng, edge, 2)


def _creature(rng: random.Random, size: Size) -> np.ndarray:
    """A dark or bright body with limbs, in front of something plain or of a photograph's ground."""
    width, height = size
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    x, y = rng.uniform(0.3, 0.7) * width, rng.uniform(0.3, 0.7) * height
    for _ in range(rng.randint(3, 7)):
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.5) * min(size)
        thick = rng.uniform(0.03, 0.14) * min(size)
        end = x + length * np.cos(angle), y + length * np.sin(angle)
        pen.line((x, y, *end), fill=255, width=max(2, round(thick)))
        pen.ellipse((end[0] - thick, end[1] - thick / 2, end[0] + thick, end[1] + thick / 2), fill=255)
        if rng.random() < 0.5:
            x, y = (x + end[0]) / 2, (y + end[1]) / 2
    a, b = rng.uniform(0.12, 0.3) * width, rng.uniform(0.06, 0.2) * height
    pen.ellipse((x - a, y - b, x + a, y + b), fill=255)
    mask = mask.rotate(rng.uniform(-30, 30)).filter(ImageFilter.GaussianBlur(rng.choice((0.4, 1, 2.5))))
    share = np.asarray(mask, dtype=np.float32)[..., None] / 255
    dice = np.random.default_rng(rng.getrandbits(32))
    sort = rng.random()
    if sort < 0.4:  # two tones
        ground, body = rng.sample([(0,) * 3, (255,) * 3, (rng.uniform(0, 255),) * 3], 2)
        return np.array(ground) + share * (np.array(body) - np.array(ground))
    ground = _palette(rng, _fractal(dice, size, 0.5), 2) if sort < 0.8 else _hills(rng, size)
    body = _palette(rng, _fractal(dice, size, 0.6), 2) * rng.choice((0.3, 1.0))
    return ground + share * (body - ground)


def _surface(rng: random.Random, size: Size) -> np.ndarray:
    """Something smooth and pale with pits and grains: a moon, skin, a slide under a microscope."""
    dice = np.random.default_rng(rng.getrandbits(32))
    width, height = size
    mix = rng.uniform(0.3, 1) * _fractal(dice, size, rng.uniform(0.3, 0.6)) + 0.3 * _field(dice, size, (2, 2))
    y, x = np.mgrid[0:height, 0:width]
    for _ in range(rng.randint(1, 14)):
        cx, cy, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.02, 0.16) * min(size)
        far = np.hypot((x - cx) * rng.uniform(0.6, 1.6), y - cy) / r
        mix += rng.uniform(-0.6, 0.6) * np.exp(-((far - rng.choice((0, 0, 1))) ** 2) * rng.uniform(1, 4))
    mix = (mix - mix.min()) / max(float(np.ptp(mix)), 1e-6)
    low, high = sorted((rng.uniform(0, 255), rng.uniform(0, 255)))
    return np.repeat((low + (high - low) * mix)[..., None], 3, axis=-1)


def _coins(rng: random.Random, size: Size) -> np.ndarray:
    """Embossed discs: rows of grey ones, or a few large ones in colours, as blossoms and cups are."""
    dice = np.random.default_rng(rng.getrandbits(32))
    width, height = size
    pixels = rng.uniform(20, 120) + 60 * _fractal(dice, size, 0.5)
    few = rng.random() < 0.6
    across, down = (rng.randint(1, 2), rng.randint(1, 2)) if few else (rng.randint(3, 7), rng.randint(2, 5))
    relief = _fractal(dice, size, 0.95, 9)
    y, x = np.mgrid[0:height, 0:width]
    for column in range(across):
        for row in range(down):
            cx = (column + 0.5 + rng.uniform(-0.15, 0.15)) * width / across
            cy = (row + 0.5 + rng.uniform(-0.15, 0.15)) * height / down
            r = rng.uniform(0.28, 0.48) * min(width / across, height / down)
            inside = np.clip(r - np.hypot(x - cx, y - cy), 0, 1)
            pixels = pixels + inside * (rng.uniform(60, 190) + 110 * (relief - 0.5) - pixels)
    if few and rng.random() < 0.7:
        return _palette(rng, np.clip(pixels / 255, 0, 1), rng.randint(2, 4))
    return np.repeat(pixels[..., None], 3, axis=-1)


SORTS: dict[str, tuple[Callable[[random.Random, Size], np.ndarray], float]] = {
    "clouds": (_clouds, 2),
    "hills": (_hills, 2),
    "texture": (_texture, 2),
    "heap": (_heap, 4),
    "walls": (_walls, 2),
    "page": (_page, 1),
    "cells": (_cells, 1.5),
    "specks": (_specks, 1),
    "silhouette": (_silhouette, 1.5),
    "creature": (_creature, 3),
    "surface": (_surface, 2.5),
    "coins": (_coins, 2.5),
}
"""What is drawn, and how often."""


def draw_clutter(rng: random.Random, size: Size) -> Image.Image:
    """A picture of a random sort, as a camera might have taken it: dark, pale, soft, grey or grainy."""
    draw = rng.choices([draw for draw, _ in SORTS.values()], [share for _, share in SORTS.values()])[0]
    pixels = draw(rng, size)
    if rng.random() < 0.45:
        pixels = np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1)
    if rng.random() < 0.4:
        middle = pixels.mean()
        pixels = middle + rng.uniform(0.4, 1.5) * (pixels - middle) + rng.uniform(-40, 40)
    if rng.random() < 0.4:
        dice = np.random.default_rng(rng.getrandbits(32))
        pixels = pixels + rng.uniform(2, 25) * dice.standard_normal(pixels.shape, dtype=np.float32)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 2.0)))
    return picture
