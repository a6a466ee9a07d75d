"""Draws the contact sheet: a grid of cards, each with pictures, a question, the answer and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]

PAPER: RGB = (241, 242, 245)
CARD: RGB = (255, 255, 255)
EDGE: RGB = (222, 225, 231)
INK: RGB = (24, 28, 36)
SOFT: RGB = (112, 119, 132)
MAT: RGB = (232, 234, 239)
FILM: RGB = (32, 34, 40)
GOOD: RGB = (22, 138, 76)
BAD: RGB = (204, 48, 48)

COLUMNS = 4
CARD_WIDTH = 440
STAGE_HEIGHT = 270
PADDING = 22
GUTTER = 26
MARGIN = 52
HEADER = 132


@dataclass(frozen=True)
class Card:
    """One question with its pictures, or with the frames of its video."""

    kind: str
    question: str
    answer: str
    truth: str
    images: tuple[Image.Image, ...] = ()
    frames: tuple[Image.Image, ...] = ()

    @property
    def right(self) -> bool:
        return self.answer == self.truth


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    face = ImageFont.load_default(size=size)
    if not isinstance(face, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, so it has no scalable typeface")
    return face


def wrap(text: str, face: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Breaks text into lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and face.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _stage_pictures(stage: Image.Image, pictures: Sequence[Image.Image]) -> None:
    """One picture in the middle, or several side by side with their numbers."""
    gap, inset = 16, 16
    label = 24 if len(pictures) > 1 else 0
    cell = (stage.width - 2 * inset - gap * (len(pictures) - 1)) // len(pictures)
    pen = ImageDraw.Draw(stage)
    for i, picture in enumerate(pictures):
        shown = _fit(picture, cell, stage.height - 2 * inset - label)
        centre = inset + i * (cell + gap) + cell // 2
        top = (stage.height - shown.height - label) // 2
        stage.paste(shown, (centre - shown.width // 2, top))
        if label:
            name = ("first", "second", "third", "fourth")[i] if i < 4 else str(i + 1)
            pen.text((centre, top + shown.height + 7), name, fill=SOFT, font=font(15), anchor="ma")


def _stage_film(stage: Image.Image, frames: Sequence[Image.Image]) -> None:
    """Frames in time order on one or two strips of film."""
    rows = 1 if len(frames) <= 3 else 2
    per_row = -(-len(frames) // rows)
    gap, hole, inset = 6, 5, 12
    band = hole + 8
    strip_height = (stage.height - 2 * inset - (rows - 1) * 10) // rows
    pen = ImageDraw.Draw(stage)
    width = (stage.width - 2 * inset - gap * (per_row + 1)) // per_row
    shown = [_fit(frame, width, strip_height - 2 * band) for frame in frames]
    strip_height = shown[0].height + 2 * band
    top = (stage.height - rows * strip_height - (rows - 1) * 10) // 2
    for row in range(rows):
        line = shown[row * per_row : (row + 1) * per_row]
        left = (stage.width - per_row * (line[0].width + gap) - gap) // 2
        length, y = len(line) * (line[0].width + gap) + gap, top + row * (strip_height + 10)
        pen.rounded_rectangle((left, y, left + length, y + strip_height), 4, fill=FILM)
        for x in range(left + gap, left + length - hole - 2, 14):
            for edge in (y + 4, y + strip_height - 4 - hole):
                pen.rounded_rectangle((x, edge, x + hole + 1, edge + hole), 1, fill=MAT)
        for i, frame in enumerate(line):
            stage.paste(frame, (left + gap + i * (frame.width + gap), y + band))


def _mark(sheet: Image.Image, x: int, y: int, right: bool) -> None:
    """A tick or a cross in a disc, drawn large and reduced for smooth lines."""
    size, factor = 26, 4
    large = Image.new("RGBA", (size * factor, size * factor))
    pen = ImageDraw.Draw(large)
    pen.ellipse((0, 0, size * factor - 1, size * factor - 1), fill=(*(GOOD if right else BAD), 255))
    strokes = [[(28, 54), (45, 71), (77, 36)]] if right else [[(34, 34), (70, 70)], [(70, 34), (34, 70)]]
    for stroke in strokes:
        pen.line(stroke, fill="white", width=11, joint="curve")
    small = large.resize((size, size), Image.Resampling.LANCZOS)
    sheet.paste(small, (x, y), small)


def _text_height(card: Card) -> int:
    width = CARD_WIDTH - 2 * PADDING
    height = 18 + 22 + 27 * len(wrap(card.question, font(21), width)) + 8
    height += 27 * len(wrap(card.answer or "(nothing)", font(21), width - 36))
    if not card.right:
        height += 6 + 22 * len(wrap(f"should be: {card.truth}", font(17), width - 36))
    return height + 20


def _draw_card(sheet: Image.Image, card: Card, left: int, top: int, height: int) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.rounded_rectangle((left, top, left + CARD_WIDTH, top + height), 12, fill=CARD, outline=EDGE, width=1)
    stage = Image.new("RGB", (CARD_WIDTH - 2, STAGE_HEIGHT), MAT)
    if card.frames:
        _stage_film(stage, card.frames)
    else:
        _stage_pictures(stage, card.images)
    corners = Image.new("L", stage.size)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, stage.width, stage.height + 20), 11, fill=255)
    sheet.paste(stage, (left + 1, top + 1), corners)

    x, y, width = left + PADDING, top + STAGE_HEIGHT + 18, CARD_WIDTH - 2 * PADDING
    pen.text((x, y), card.kind.upper(), fill=SOFT, font=font(13))
    y += 22
    for line in wrap(card.question, font(21), width):
        pen.text((x, y), line, fill=INK, font=font(21))
        y += 27
    y += 8
    _mark(sheet, x, y - 1, card.right)
    for line in wrap(card.answer or "(nothing)", font(21), width - 36):
        pen.text((x + 36, y), line, fill=GOOD if card.right else BAD, font=font(21))
        y += 27
    if not card.right:
        y += 6
        for line in wrap(f"should be: {card.truth}", font(17), width - 36):
            pen.text((x + 36, y), line, fill=SOFT, font=font(17))
            y += 22


def contact_sheet(cards: Sequence[Card], title: str, subtitle: str) -> Image.Image:
    """All cards in rows of four; the cards of a row are equally tall."""
    rows = [cards[i : i + COLUMNS] for i in range(0, len(cards), COLUMNS)]
    heights = [STAGE_HEIGHT + max(map(_text_height, row)) for row in rows]
    width = 2 * MARGIN + COLUMNS * CARD_WIDTH + (COLUMNS - 1) * GUTTER
    height = HEADER + sum(heights) + GUTTER * (len(rows) - 1) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 34), title, fill=INK, font=font(38))
    pen.text((MARGIN, 86), subtitle, fill=SOFT, font=font(20))
    top = HEADER
    for row, tall in zip(rows, heights, strict=True):
        for i, card in enumerate(row):
            _draw_card(sheet, card, MARGIN + i * (CARD_WIDTH + GUTTER), top, tall)
        top += tall + GUTTER
    return sheet
