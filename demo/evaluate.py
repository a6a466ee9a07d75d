"""Measures a demonstration model through opsin on scenes that it was never trained on.

python demo/evaluate.py --family llava                  # a line a kind, a column a picture size
python demo/evaluate.py --family llava --wordings       # a column a wording, text before and behind pictures
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from models import MODELS, DemoModel
from run import conversation
from scenes import HELD_OUT_SEEDS, KINDS, Question
from tqdm import tqdm
from wordings import WORDINGS

CHUNK = 500
"""Questions drawn and asked at a time: keeps memory small however many there are."""
MOST_TOKENS = 64
"""No answer is nearly as long: one that gets here goes round in circles."""
ORDERS = ("pictures first", "text first")
Scores = dict[str, dict[str, list[bool]]]
"""For each row and column of the table, whether answers were right."""


def held_out(
    model: DemoModel, kinds: Sequence[str], args: argparse.Namespace
) -> Iterator[tuple[str, str, Question, bool]]:
    """Questions: the row and the column that each belongs to, and whether it stands before its pictures."""
    if not args.wordings:
        for kind in kinds:
            for i in range(args.limit):
                size, question = model.question(kind, args.seed + i)
                yield kind, size, question, False
        return
    for name, wording in WORDINGS.items():
        for order in ORDERS:
            for i in range(args.limit):
                kind = kinds[i % len(kinds)]
                _, question = model.question(kind, args.seed + i)
                text = wording(kind, question.text, random.Random(f"{name}/{i}"))
                yield name, order, replace(question, text=text), order == "text first"


def markdown(model: str, args: argparse.Namespace, scores: Scores, loops: int, seconds: float) -> str:
    """The table: one line a kind or wording, with the share under every heading."""
    each = "wording and order, all kinds in turn," if args.wordings else "kind"
    lines = [
        f"# Accuracy of {model}",
        "",
        f"{args.limit:,} held-out scenes of every {each} from seed {args.seed}, greedy decoding, "
        f"{seconds:.0f} s in all. An answer counts only if it is exactly right; {loops} went on until they "
        "were cut off.",
        "",
    ]
    if args.wordings:
        lines += [f"| wording | {' | '.join(ORDERS)} |", "| --- | ---: | ---: |"]
        for name, by in scores.items():
            lines.append(f"| {name} | {' | '.join(share(by[order]) for order in ORDERS)} |")
    else:
        lines += ["| kind | right | at each picture size |", "| --- | ---: | --- |"]
        for kind, by in scores.items():
            marks = [mark for size in by.values() for mark in size]
            detail = ", ".join(f"{size}: {share(marks)}" for size, marks in by.items())
            lines.append(f"| {kind} | {share(marks)} | {detail} |")
    return "\n".join(lines) + "\n"


def share(marks: Sequence[bool]) -> str:
    return f"{100 * sum(marks) / len(marks):.1f} %"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=1000, help="scenes of every kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEEDS[0], help="first scene (%(default)s)")
    parser.add_argument(
        "--family", choices=list(MODELS), default="qwen2vl", help="whose demonstration model (%(default)s)"
    )
    parser.add_argument("--model", help="another checkpoint to ask the family's questions")
    parser.add_argument(
        "--quantization", "-q", default="auto", help="bits of weights, as of `opsin serve` (%(default)s)"
    )
    parser.add_argument(
        "--mm-processor-kwargs", type=json.loads, default={}, help="e.g. '{\"max_slice_nums\": 9}'"
    )
    parser.add_argument("--wordings", action="store_true", help="in every wording, on both sides of pictures")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="all that it answers unless given")
    parser.add_argument("--out", type=Path, help="where the table goes (demo-output/accuracy-FAMILY.md)")
    parser.add_argument("--mistakes", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    if not HELD_OUT_SEEDS[0] <= args.seed <= HELD_OUT_SEEDS[1] - args.limit:
        parser.error(f"--seed must keep to the held-out scenes: {HELD_OUT_SEEDS[0]} to {HELD_OUT_SEEDS[1]}")
    return args


def main() -> int:
    args = arguments()

    from opsin import LLM, SamplingParams

    demo = MODELS[args.family]
    name, out = args.model or demo.id, args.out or Path(f"demo-output/accuracy-{args.family}.md")
    settings: dict[str, Any] = {"mm_processor_kwargs": args.mm_processor_kwargs or None}
    llm = LLM(model=name, quantization=args.quantization, **settings)
    params = SamplingParams(temperature=0, max_tokens=MOST_TOKENS)
    scores: Scores = {}
    loops = 0
    start = time.perf_counter()
    kinds = args.kinds or demo.kinds
    questions = held_out(demo, kinds, args)
    total = args.limit * (len(WORDINGS) * len(ORDERS) if args.wordings else len(kinds))
    with tqdm(total=total, unit="scene") as bar:
        while chunk := list(islice(questions, CHUNK)):
            bar.set_description(chunk[0][0])
            chats = [conversation(question, text_first) for _, _, question, text_first in chunk]
            outputs = llm.chat(chats, params, use_tqdm=False)
            for (row, column, question, _), output in zip(chunk, outputs, strict=True):
                answer = output.outputs[0].text.strip()
                loops += output.outputs[0].finish_reason == "length"
                scores.setdefault(row, {}).setdefault(column, []).append(answer == question.answer)
                if args.mistakes and answer != question.answer:
                    tqdm.write(f"{row} {column}: {question.text} {answer!r}, should be {question.answer!r}")
            bar.update(len(chunk))
    table = markdown(name, args, scores, loops, time.perf_counter() - start)
    print("\n" + table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table)
    print(f"Table: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
