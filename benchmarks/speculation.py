"""What n-gram speculation gains and costs: the same requests with and without it, taking turns.

Answers of the synthetic checkpoint are random, so its repetitive tasks are made by constraints: JSON of a
schema, JSON of the same schema as in two earlier answers of the conversation, and a text of the prompt word
for word. Free answers are sampled from it at temperature 1 (nothing repeats), and come as they are from the
tiny model.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import synthetic
import worker

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

OUT = Path(__file__).parent / "results" / "speculation.md"
SETTINGS = {"method": "ngram", "num_speculative_tokens": 8}
WAYS = ("without", "with")

COLOURS = ("red", "green", "blue", "black", "white")
SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 5,
    "maxItems": 5,
    "items": {
        "type": "object",
        "properties": {
            "shape": {"enum": ["circle", "square", "line"]},
            "colour": {"enum": list(COLOURS)},
            "left": {"type": "boolean"},
        },
        "required": ["shape", "colour", "left"],
        "additionalProperties": False,
    },
}

Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """Requests of one kind; ``draw`` makes one: a conversation, and settings of its answer."""

    name: str
    draw: Callable[[random.Random], tuple[Chat, dict[str, Any]]]


def _user(text: str, chance: random.Random) -> dict[str, Any]:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(chance.getrandbits(32)).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    picture = {"type": "image_pil", "image_pil": Image.fromarray(pixels)}
    return {"role": "user", "content": [picture, {"type": "text", "text": text}]}


def _words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choice(synthetic.WORDS) for _ in range(count))


def _objects(chance: random.Random) -> str:
    return json.dumps(
        [
            {
                "shape": chance.choice(["circle", "square", "line"]),
                "colour": chance.choice(COLOURS),
                "left": chance.random() < 0.5,
            }
            for _ in range(5)
        ]
    )


def _structured(chance: random.Random) -> tuple[Chat, dict[str, Any]]:
    from opsin import StructuredOutputsParams

    question = _user(f"describe the {_words(chance, 12)}", chance)
    return [question], {
        "temperature": 0,
        "structured": StructuredOutputsParams(json=SCHEMA),
        "max_tokens": 160,
    }


def _again(chance: random.Random) -> tuple[Chat, dict[str, Any]]:
    from opsin import StructuredOutputsParams

    turns: Chat = [_user(f"describe the {_words(chance, 12)}", chance)]
    for _ in range(2):
        turns.append({"role": "assistant", "content": _objects(chance)})
        turns.append({"role": "user", "content": f"and the {_words(chance, 3)}"})
    return turns, {"temperature": 0, "structured": StructuredOutputsParams(json=SCHEMA), "max_tokens": 160}


def _copy(chance: random.Random) -> tuple[Chat, dict[str, Any]]:
    from opsin import StructuredOutputsParams

    text = _words(chance, 80)
    wanted = StructuredOutputsParams(choice=[" ".join(text.split()[10:70])])
    return [_user(f"read {text}", chance)], {"temperature": 0, "structured": wanted, "max_tokens": 160}


def _free(chance: random.Random) -> tuple[Chat, dict[str, Any]]:
    settings = {"temperature": 1.0, "seed": chance.getrandbits(30), "max_tokens": 96, "ignore_eos": True}
    return [_user(f"describe the {_words(chance, 60)}", chance)], settings


def _scene(chance: random.Random) -> tuple[Chat, dict[str, Any]]:
    from models import MODELS
    from run import conversation
    from scenes import FRESH_SEEDS

    seed = FRESH_SEEDS[0] + chance.randrange(1000)
    question = MODELS["qwen2vl"].question("describe", seed)[1]
    return conversation(question), {"temperature": 0, "max_tokens": 96}


CONSTRAINED = (
    Task("JSON of a schema", _structured),
    Task("the same question again: JSON as in two earlier answers", _again),
    Task("copying 60 words of the prompt", _copy),
)
MODELS = {
    "synthetic 0.5B": (*CONSTRAINED, Task("free: sampled at temperature 1", _free)),
    "opsin/tiny-qwen2vl": (*CONSTRAINED, Task("free: descriptions of scenes", _scene)),
}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8], help="requests at once (1 8)")
    parser.add_argument("--only", choices=list(MODELS), help="one of the models")
    parser.add_argument("--checkpoint", type=Path, help="a folder with the synthetic checkpoint")
    parser.add_argument("--threads", type=int, default=worker.usable_cores(), help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="(%(default)s)")
    return parser.parse_args(arguments)


def rows(name: str, asked: argparse.Namespace) -> Iterator[str]:
    """A line of the table for each task and number of requests."""
    from opsin import LLM, SamplingParams

    folder = str(asked.checkpoint or synthetic.checkpoint()) if name.startswith("synthetic") else name
    with LLM(folder, dtype="float32", speculative_config=SETTINGS, kv_cache_memory=2**28) as llm:
        engine = llm.engine
        drafter = engine.scheduler.drafter
        assert drafter is not None

        def run(task: Task, at_once: int, repetition: int, way: str) -> tuple[list[list[int]], float]:
            drawn = [
                task.draw(random.Random(f"{task.name} {at_once} {repetition} {i}")) for i in range(at_once)
            ]
            engine.scheduler.drafter = drafter if way == "with" else None
            chats = [chat for chat, _ in drawn]
            # Pictures are encoded beforehand, or the second way would find them encoded by the first.
            llm.chat(chats, SamplingParams(max_tokens=1), use_tqdm=False)
            engine.reset_prefix_cache()
            started = time.perf_counter()
            outputs = llm.chat(chats, [SamplingParams(**wish) for _, wish in drawn], use_tqdm=False)
            seconds = time.perf_counter() - started
            return [list(output.outputs[0].token_ids) for output in outputs], seconds

        run(MODELS[name][0], 1, -1, "with")  # libraries compile and allocate on first use
        for task in MODELS[name]:
            for at_once in asked.at_once:
                before = drafter.num_draft_tokens, drafter.num_accepted
                rates: dict[str, list[float]] = {way: [] for way in WAYS}
                different = count = 0
                for repetition in range(asked.repetitions):
                    answers = {}
                    for way in WAYS if repetition % 2 == 0 else WAYS[::-1]:
                        answers[way], seconds = run(task, at_once, repetition, way)
                        rates[way].append(sum(map(len, answers[way])) / seconds)
                    count += at_once
                    different += sum(a != b for a, b in zip(*answers.values()))
                drafted, accepted = drafter.num_draft_tokens - before[0], drafter.num_accepted - before[1]
                plain, drafting = (statistics.median(rates[way]) for way in WAYS)
                ratios = sorted(b / a for a, b in zip(rates["without"], rates["with"]))
                share = f"{accepted / drafted:.0%} of {drafted}" if drafted else "none made"
                yield (
                    f"| {name} | {task.name} | {at_once} | {plain:.1f} | {drafting:.1f} "
                    f"| {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {share} "
                    f"| {count - different} of {count} |"
                )


HEAD = """# N-gram speculation

`make bench-speculation`: tokens per second of whole calls, prompts included, with and without
`speculative_config={settings}` in turn, float32, {threads} threads, median of {repetitions}.

| model | task | requests at once | tokens/s without | with | ratio | right drafted tokens | same answers |
|---|---|---|---|---|---|---|---|"""


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    asked = options()
    worker.settle(asked.threads)
    lines = [HEAD.format(settings=SETTINGS, threads=asked.threads, repetitions=asked.repetitions)]
    print(lines[0], flush=True)
    for name in MODELS if asked.only is None else (asked.only,):
        for line in rows(name, asked):
            print(line, flush=True)
            lines.append(line)
    asked.out.parent.mkdir(exist_ok=True)
    asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
