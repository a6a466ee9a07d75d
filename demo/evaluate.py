"""Measures the demonstration model through opsin on scenes that it was never trained on."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from run import conversation
from scenes import HELD_OUT_SEEDS, KINDS, Question, Size, make_question
from tqdm import tqdm

SIZES: dict[str, tuple[Size | None, ...]] = {
    "colour": ((56, 56), (84, 112), (133, 100), (168, 168), (224, 160), None),
    "shape": ((56, 56), (84, 112), (133, 100), (168, 168), (224, 160), None),
    "position": ((56, 56), (84, 112), (133, 100), (168, 168), (224, 160), None),
    "describe": ((56, 56), (84, 112), (133, 100), (168, 168), (224, 160), None),
    "count": ((84, 84), (112, 140), (133, 100), (168, 168), (224, 160), None),
    "number": ((56, 56), (84, 84), (133, 100), (140, 112), (168, 140), None),
    "compare": ((84, 84), (84, 112), (133, 100), (140, 112), (140, 140), None),
    "motion": ((56, 56), (84, 112), (100, 75), (112, 112), (140, 98), None),
}
"""Widths and heights of the pictures that a kind is asked about, in turn; None: drawn from the seed."""

CHUNK = 500
"""Questions drawn and asked at a time: keeps memory small however many there are."""


def held_out(kind: str, seed: int, limit: int) -> Iterator[tuple[str, Question]]:
    """Questions of a kind with the name of their size."""
    for i in range(limit):
        size = SIZES[kind][i % len(SIZES[kind])]
        yield "mixed" if size is None else f"{size[0]}×{size[1]}", make_question(kind, seed + i, size)


def markdown(
    model: str, seed: int, limit: int, scores: dict[str, dict[str, list[bool]]], seconds: float
) -> str:
    """The table: one line a kind, with the share at every size."""
    lines = [
        f"# Accuracy of {model}",
        "",
        f"{limit:,} held-out scenes of every kind from seed {seed}, greedy decoding, {seconds:.0f} s in all. "
        "An answer counts only if it is exactly right.",
        "",
        "| kind | right | at each picture size |",
        "| --- | ---: | --- |",
    ]
    for kind, by_size in scores.items():
        marks = [mark for size in by_size.values() for mark in size]
        detail = ", ".join(f"{size}: {100 * sum(m) / len(m):.1f} %" for size, m in by_size.items())
        lines.append(f"| {kind} | {100 * sum(marks) / len(marks):.1f} % | {detail} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=1000, help="scenes of every kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEEDS[0], help="first scene (%(default)s)")
    parser.add_argument("--model", default="opsin/tiny-qwen2vl", help="what to ask (%(default)s)")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="all unless given"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output/accuracy.md"), help="where the table goes"
    )
    parser.add_argument("--mistakes", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    if not HELD_OUT_SEEDS[0] <= args.seed <= HELD_OUT_SEEDS[1] - args.limit:
        parser.error(f"--seed must keep to the held-out scenes: {HELD_OUT_SEEDS[0]} to {HELD_OUT_SEEDS[1]}")

    from opsin import LLM, SamplingParams

    llm, params = LLM(model=args.model), SamplingParams(temperature=0, max_tokens=48)
    scores: dict[str, dict[str, list[bool]]] = {}
    start = time.perf_counter()
    for kind in args.kinds:
        scores[kind] = {}
        questions = held_out(kind, args.seed, args.limit)
        with tqdm(total=args.limit, desc=kind, unit="scene") as bar:
            while chunk := list(islice(questions, CHUNK)):
                outputs = llm.chat([conversation(question) for _, question in chunk], params, use_tqdm=False)
                for (size, question), output in zip(chunk, outputs, strict=True):
                    answer = output.outputs[0].text
                    scores[kind].setdefault(size, []).append(answer == question.answer)
                    if args.mistakes and answer != question.answer:
                        tqdm.write(
                            f"{kind} {size}: {question.text} {answer!r}, should be {question.answer!r}"
                        )
                bar.update(len(chunk))
    table = markdown(args.model, args.seed, args.limit, scores, time.perf_counter() - start)
    print("\n" + table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(table)
    print(f"Table: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
