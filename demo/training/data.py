"""Turns scenes into batches of conversations, through the same resizing as the real image processors."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
import torch
from batch import Batch, Tokens, collate
from camera import Camera
from drawing import COLOURS, SHAPES, Size
from family import Family, Plan
from scenes import PLACES, SMALL_TALK, Scene, at, make_scene, with_article
from tokenizers import Tokenizer
from wordings import reworded

SYSTEMS = (
    "You are a helpful assistant.",
    "Look at the picture and answer.",
    "You are a helpful assistant that describes images.",
    "You answer questions about pictures.",
    "Answer briefly.",
    "Be concise.",
    "You are a friendly assistant. Always answer in English.",
)
SHARES = {"tree": 70, "turns": 10, "greeted": 3}
"""How often a conversation has which form, where the family has it."""
TEXT_FIRST = 0.35
"""The share of batches whose questions stand before their pictures, where the family can have them there."""
PHOTOGRAPHS = 0.6
"""How often a picture without a shape is a photograph, if there are any."""


def told(rng: random.Random) -> tuple[str, str]:
    """A picture in words, with a question about it: so words and pictures come to mean the same."""
    colour, shape, place = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(PLACES))
    where = f" {at(place)}" if rng.random() < 0.5 else ""
    asked = [("What colour is the shape?", colour), (f"What colour is the {shape}?", colour)]
    asked += [("What shape is it?", shape), (f"What shape is the {colour} object?", shape)]
    asked += [("Where is it?", place), (f"Where is the {shape}?", place)] if where else []
    question, answer = rng.choice(asked)
    return reworded("told", f"{with_article(colour).capitalize()} {shape}{where}. {question}", rng), answer


def as_planned(name: str, plan: Plan, sizes: list[Size]) -> tuple[list[Size], dict[str, object]]:
    """The sizes of a scene's pictures, and what `make_scene` is told besides the first."""
    if name in ("compare", "pair"):
        return sizes, {"second": sizes[1]}
    if name == "motion":
        return sizes, {"frames": plan.frames}
    if name == "film":  # frames of one film have one size
        return sizes[:1] * len(plan.shapes), {"frames": len(plan.shapes)}
    return sizes, {}


class BatchMaker:
    """Draws batches; one batch holds one kind of scene, cut in one way."""

    def __init__(
        self,
        family: Family,
        words: Tokenizer,
        seeds: tuple[int, int],
        patches: int,
        camera: Camera | None = None,
    ) -> None:
        self.family = family
        self.seeds = seeds
        self.patches = patches
        self.camera = camera
        self.encode = lru_cache(maxsize=50_000)(lambda text: words.encode(text, add_special_tokens=False).ids)
        self.end = words.token_to_id(family.end)

    def _turn(self, s: Tokens, question: str, answer: str, pictured: bool) -> None:
        self.family.ask(s, self.encode, question, pictured)
        s.answer(self.encode(answer), self.end)

    def conversation(
        self,
        scene: Scene,
        plan: Plan,
        rng: random.Random,
        branches: int,
        plain: bool,
        text_first: bool = False,
    ) -> Tokens:
        """One scene's conversation tree. `plain` leaves out the rarer forms.

        `text_first`: so many branches, each with the pictures behind it; too few questions are asked again.
        """
        s, family = Tokens(), self.family
        forms = [form for form in family.forms if form in SHARES]
        form = "tree" if plain else rng.choices(forms, [SHARES[form] for form in forms])[0]
        system = None if plain or rng.random() < 0.85 else rng.choice(SYSTEMS)
        family.begin(s, self.encode, system)
        asked = rng.sample(scene.questions, min(branches, len(scene.questions)))
        if scene.questions[-1][0].startswith("describe") and not plain:
            asked[-1] = scene.questions[-1]  # the longest answer by far, and the most to learn from
            asked = list(dict.fromkeys(asked))
        if not plain:
            asked = [(kind, reworded(kind, text, rng), answer) for kind, text, answer in asked]
        numbered = not plain and rng.random() < 0.05
        if text_first:
            fork = s.next
            asked = [asked[i % len(asked)] for i in range(branches)]
            s.kinds = [f"{kind} (text first)" for kind, _, _ in asked]
            for i, (_, question, answer) in enumerate(asked):
                s.branch, s.next = i + 1, fork
                family.open_turn(s, self.encode, question)
                family.show(s, self.encode, plan, numbered)
                self._turn(s, "", answer, pictured=True)
            return s
        if scene.single and not plain and rng.random() < 0.4:
            for i, questions in enumerate(scene.single):
                if i:
                    s.text(self.encode(family.separator))
                kind, question, answer = rng.choice(questions)
                s.kinds.append(kind)
                family.open_turn(s, self.encode)
                family.show(s, self.encode, plan, numbered, only=i)
                self._turn(s, reworded(kind, question, rng), answer, pictured=True)
            return s
        if form == "greeted":
            self._turn(s, *rng.choice(list(SMALL_TALK.items())), pictured=False)
            s.text(self.encode(family.separator))
        family.open_turn(s, self.encode)
        family.show(s, self.encode, plan, numbered)
        s.kinds = [kind for kind, _, _ in asked]
        fork = s.next
        for i, (_, question, answer) in enumerate(asked):
            if form == "turns":
                if i:
                    s.text(self.encode(family.separator))
                self._turn(s, question, answer, pictured=i == 0)
            else:
                s.branch, s.next = i + 1, fork
                self._turn(s, question, answer, pictured=True)
        return s

    def talk(self, rng: random.Random, count: int) -> Batch:
        """Conversations without a picture."""
        made = []
        for _ in range(count):
            s = Tokens()
            self.family.begin(s, self.encode, None)
            for i in range(rng.choice((1, 1, 2))):
                if i:
                    s.text(self.encode(self.family.separator))
                said = told(rng) if rng.random() < 0.5 else rng.choice(list(SMALL_TALK.items()))
                self._turn(s, *said, pictured=False)
                s.kinds.append("talk")
            made.append(s)
        return collate("talk", made, [], [], [])

    def batch(self, name: str, rng: random.Random, count: int | None = None, plain: bool = False) -> Batch:
        if name == "talk":
            return self.talk(rng, count or 16)
        plan = self.family.draw(name, rng)
        patches = self.family.patches(plan)
        text_first = not plain and "text first" in self.family.forms and rng.random() < TEXT_FIRST
        count = count or min(64, max(6, self.patches // (patches + 48)))
        branches = 8 if plain else {"motion": 4, "number": 3, "film": 2, "nothing": 3}.get(name, 5)
        if text_first:  # every branch has the pictures once more, of the same number in each conversation
            count, branches = max(6, count * 2 // 3), min(branches, 2)
        made, views = [], []
        for _ in range(count):
            seed = rng.randrange(*self.seeds)
            sizes = [self.family.size_for(shape, name, rng) for shape in plan.shapes]
            sizes, options = as_planned(name, plan, sizes)
            scene = make_scene(name, seed, sizes[0], **options)
            if name == "nothing" and self.camera and rng.random() < PHOTOGRAPHS:
                scene.images[0] = self.camera.picture(rng, sizes[0])
            views.append(self.family.look(scene, plan, sizes))
            made.append(self.conversation(scene, plan, rng, branches, plain, text_first))
        beside = list(zip(*views, strict=True))
        pixels = [torch.from_numpy(np.stack([view.pixels for view in column])) for column in beside]
        hints = [torch.from_numpy(np.stack([view.hints for view in column])) for column in beside]
        return collate(name, made, pixels, [column[0].shape for column in beside], hints)
