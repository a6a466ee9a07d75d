"""Measures a demonstration model through opsin on scenes that it was never trained on."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from models import MODELS, DemoModel
from run import conversation
from scenes import HELD_OUT_SEEDS, KINDS, Question
from tqdm import tqdm

CHUNK = 500
"""Questions drawn and asked at a time: keeps memory small however many there are."""


def held_out(model: DemoModel, kind: str, seed: int, limit: int) -> Iterator[tuple[str, Question]]:
    """Questions of a kind with the name of their size."""
    for i in range(limit):
        yield model.question(kind, seed + i)


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
    parser.add_argument(
        "--family", choices=list(MODELS), default="qwen2vl", help="whose demonstration model (%(default)s)"
    )
    parser.add_argument("--model", help="another checkpoint to ask the family's questions")
    parser.add_argument(
        "--quantization", "-q", default="auto", help="bits of weights, as of `opsin serve` (%(default)s)"
    )
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="all that it answers unless given")
    parser.add_argument("--out", type=Path, help="where the table goes (demo-output/accuracy-FAMILY.md)")
    parser.add_argument("--mistakes", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    if not HELD_OUT_SEEDS[0] <= args.seed <= HELD_OUT_SEEDS[1] - args.limit:
        parser.error(f"--seed must keep to the held-out scenes: {HELD_OUT_SEEDS[0]} to {HELD_OUT_SEEDS[1]}")

    from opsin import LLM, SamplingParams

    demo = MODELS[args.family]
    name, out = args.model or demo.id, args.out or Path(f"demo-output/accuracy-{args.family}.md")
    llm, params = (
        LLM(model=name, quantization=args.quantization),
        SamplingParams(temperature=0, max_tokens=48),
    )
    scores: dict[str, dict[str, list[bool]]] = {}
    start = time.perf_counter()
    for kind in args.kinds or demo.kinds:
        scores[kind] = {}
        questions = held_out(demo, kind, args.seed, args.limit)
        with tqdm(total=args.limit, desc=kind, unit="scene") as bar:
            while chunk := list(islice(questions, CHUNK)):
                outputs = llm.chat([conversation(question) for _, question in chunk], params, use_tqdm=False)
                for (size, question), output in zip(chunk, outputs, strict=True):
                    answer = output.outputs[0].text.strip()
                    scores[kind].setdefault(size, []).append(answer == question.answer)
                    if args.mistakes and answer != question.answer:
                        tqdm.write(
                            f"{kind} {size}: {question.text} {answer!r}, should be {question.answer!r}"
                        )
                bar.update(len(chunk))
    table = markdown(name, args.seed, args.limit, scores, time.perf_counter() - start)
    print("\n" + table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table)
    print(f"Table: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
