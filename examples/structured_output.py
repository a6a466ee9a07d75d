"""Answers in a form that a program can read: one of several words, a number, JSON by a schema.

    python examples/structured_output.py
    python examples/structured_output.py --model Qwen/Qwen2-VL-2B-Instruct --image cat.jpg

The form is enforced while the answer is made: no answer has to be parsed twice, or asked for again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from opsin import LLM, SamplingParams
from opsin.params import StructuredOutputsParams

COLOURS = ["red", "green", "blue", "yellow", "orange", "purple", "white", "black"]


def draw() -> Image.Image:
    """Two red circles and a blue one on grey."""
    picture = Image.new("RGB", (140, 112), "grey")
    pen = ImageDraw.Draw(picture)
    for x, y, colour in ((35, 30, "red"), (100, 40, "red"), (60, 85, "blue")):
        pen.ellipse((x - 14, y - 14, x + 14, y + 14), fill=colour)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="opsin/tiny-qwen2vl", help="%(default)s")
    parser.add_argument("--image", type=Path, help="picture to ask about (default: three drawn circles)")
    args = parser.parse_args()
    picture = Image.open(args.image) if args.image else draw()
    llm = LLM(args.model)

    def ask(question: str, **form: Any) -> str:
        """One question about the picture, its answer in a form."""
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        params = SamplingParams(
            temperature=0, max_tokens=64, structured_outputs=StructuredOutputsParams(**form)
        )
        [output] = llm.chat([{"role": "user", "content": content}], params, use_tqdm=False)
        return output.outputs[0].text

    print("one of several:", ask("What colour is the shape at the bottom left?", choice=COLOURS))
    print("a number:", int(ask("How many circles are there?", regex=r"\d{1,2}")))
    # A large model fills objects, too; the tiny one knows no words for their keys.
    schema = {"type": "integer", "minimum": 0, "maximum": 9}
    print("JSON:", json.loads(ask("How many circles are there?", json=schema)))


if __name__ == "__main__":
    main()
