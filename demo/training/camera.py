"""Photographs out of a folder, as pictures without any shape that the models know.

`clutter.py` puts such pictures together from noise; real ones teach more. Any folder of photographs will
do, but for those of scikit-image and scikit-learn, which are the test. A file with transparent parts is a
thing that was cut out: it is laid on a background.
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

from clutter import draw_clutter
from drawing import Size, draw_background
from PIL import Image, ImageOps


class Camera:
    """Takes pictures of what lies in a folder: JPEG and PNG files, best not much larger than 512 pixels."""

    def __init__(self, folder: Path) -> None:
        files = [
            path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")
        ]
        if not files:
            raise SystemExit(f"--photographs {folder}: there is no JPEG or PNG file")
        self._whole: list[Path] = []
        self._cut_out: list[Path] = []
        for path in files:
            with Image.open(path) as picture:
                (self._cut_out if picture.has_transparency_data else self._whole).append(path)
        self._open = lru_cache(maxsize=256)(lambda path: Image.open(path).convert("RGBA"))

    def picture(self, rng: random.Random, size: Size) -> Image.Image:
        """A part of a photograph, or things on a background, in this size."""
        if self._cut_out and (not self._whole or rng.random() < 0.4):
            picture = self._still_life(rng, size)
        else:
            picture = self._part(rng, size)
        if rng.random() < 0.25:
            picture = ImageOps.grayscale(picture).convert("RGB")
        return ImageOps.mirror(picture) if rng.random() < 0.5 else picture

    def _part(self, rng: random.Random, size: Size) -> Image.Image:
        photograph = self._open(rng.choice(self._whole)).convert("RGB")
        width, height = photograph.size
        across = width * rng.uniform(0.3, 1.0)
        down = min(height, across * size[1] / size[0] * rng.uniform(0.8, 1.25))
        left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
        box = (left, top, left + across, top + down)
        return photograph.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)

    def _still_life(self, rng: random.Random, size: Size) -> Image.Image:
        sort = rng.random()
        if sort < 0.25:
            canvas = Image.new("RGB", size, (255, 255, 255))
        elif sort < 0.5:
            canvas = draw_background(rng, size)[0]
        elif sort < 0.75 and self._whole:
            canvas = self._part(rng, size)
        else:
            canvas = draw_clutter(rng, size)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            thing = self._open(rng.choice(self._cut_out))
            scale = rng.uniform(0.5, 1.3) * min(size) / max(thing.size)
            small = max(8, round(thing.width * scale)), max(8, round(thing.height * scale))
            thing = thing.resize(small, Image.Resampling.BICUBIC, reducing_gap=2.0)
            left, top = (
                rng.randint(-own // 5, max(1, whole - own * 4 // 5))
                for own, whole in zip(small, size, strict=True)
            )
            canvas.paste(thing, (left, top), thing)
        return canvas
