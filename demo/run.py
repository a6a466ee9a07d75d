"""Draws fresh pictures, asks a demonstration model about all of them at once, and shows what it says."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from contact_sheet import Card, contact_sheet
from models import MODELS, DemoModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scenes import FRESH_SEEDS, Question

PASSING = 0.8
"""Share of right answers below which the demonstration counts as failed."""


def ask(questions: list[Question], model: str) -> tuple[list[str], int, float]:
    """The answers, how many tokens they took, and the seconds from question to answer."""
    # torch takes seconds to import: first it is said what is wrong with the arguments.
    from opsin import LLM, SamplingParams

    llm = LLM(model=model)
    start = time.perf_counter()
    outputs = llm.chat(
        [conversation(question) for question in questions],
        SamplingParams(temperature=0, max_tokens=48),
        use_tqdm=True,
    )
    seconds = time.perf_counter() - start
    answers = [output.outputs[0] for output in outputs]
    return (
        [answer.text.strip() for answer in answers],
        sum(len(answer.token_ids) for answer in answers),
        seconds,
    )


def conversation(question: Question, text_first: bool = False) -> list[dict[str, Any]]:
    """The question as a chat: behind its pictures, or in front of them."""
    media: list[dict[str, Any]] = [{"type": "image_pil", "image_pil": image} for image in question.images]
    if question.frames:
        media.append({"type": "video", "video": list(question.frames)})
    text = [{"type": "text", "text": question.text}]
    return [{"role": "user", "content": text + media if text_first else media + text}]


def draw_questions(model: DemoModel, seed: int, count: int) -> list[Question]:
    """Every kind in turn; each question has its own scene."""
    kinds, first = model.kinds, FRESH_SEEDS[0] + seed * 1000
    return [model.question(kinds[i % len(kinds)], first + i)[1] for i in range(count)]


def run(family: str, seed: int, count: int, out: Path, console: Console) -> bool:
    """Shows one model's answers; whether enough of them are right."""
    model = MODELS[family]
    questions = draw_questions(model, seed, count)
    console.print(f"[bold]{model.title}[/] ({model.id}): {count} fresh scenes, seed {seed}\n")
    answers, tokens, seconds = ask(questions, model.id)

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("kind", "question", "answer", "truth", ""):
        table.add_column(heading)
    for question, answer in zip(questions, answers, strict=True):
        mark = Text("✓", style="green") if answer == question.answer else Text("✗", style="bold red")
        table.add_row(question.kind, question.text, answer, question.answer, mark)
    console.print(table)

    right = sum(answer == question.answer for question, answer in zip(questions, answers, strict=True))
    verdict = f"{right} of {count} right"
    console.print(
        f"\n[bold]{verdict}[/], {tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s)"
    )
    cards = [
        Card(q.kind, q.text, a, q.answer, q.images, q.frames) for q, a in zip(questions, answers, strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"contact-sheet-{family}-{seed}.png"
    contact_sheet(cards, "What the model saw", f"{model.id} · {verdict} · seed {seed}").save(path)
    console.print(f"Contact sheet: {path}\n", soft_wrap=True)
    return right >= PASSING * count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="what to draw; without it, something never drawn before")
    parser.add_argument("--count", type=int, default=24, help="questions to ask (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the contact sheet")
    parser.add_argument(
        "--family",
        choices=[*MODELS, "all"],
        default="qwen2vl",
        help="whose demonstration model (%(default)s); all: one after another",
    )
    args = parser.parse_args()
    console = Console(highlight=False)
    if args.count < 1:
        parser.error("--count must be at least 1")
    seed = int(time.time()) if args.seed is None else args.seed
    families = list(MODELS) if args.family == "all" else [args.family]
    passed = [run(family, seed, args.count, args.out, console) for family in families]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
