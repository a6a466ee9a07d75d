"""Asks a demonstration model about photographs, of which it was shown none: it shall see no shape there.

    pip install scikit-image scikit-learn
    python demo/photographs.py --family llava

The pictures are those that come inside of these two packages: photographs of people, animals, things, streets
and stars, microscope pictures, textures and printed pages.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from models import MODELS
from PIL import Image
from scenes import NOTHING, Question
from wordings import DESCRIBE, PAGE

DRAWN = {
    "chessboard_GRAY",
    "chessboard_RGB",
    "color",
    "logo",
    "phantom",
    "microaneurysms",
    "no_time_for_that_tiny",
}
"""Drawings and diagrams, a colour wheel, and animations: no photographs."""


def folder(package: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: pip install scikit-image scikit-learn")
    return Path(spec.origin).parent


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """The photographs of both packages, by name."""
    for place in (folder("skimage") / "data", folder("sklearn") / "datasets/images"):
        for path in sorted([*place.glob("*.png"), *place.glob("*.jpg")]):
            if path.stem not in DRAWN:
                yield path.stem, Image.open(path).convert("RGB")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=list(MODELS), default="qwen2vl", help="%(default)s")
    parser.add_argument("--model", help="another checkpoint of this family")
    args = parser.parse_args()

    from run import conversation

    from opsin import LLM, SamplingParams

    llm = LLM(args.model or MODELS[args.family].id)
    pictures, rng = list(photographs()), random.Random(0)
    texts = (*PAGE, *rng.sample(DESCRIBE, 4))
    chats = [conversation(Question("", t, "", (picture,))) for _, picture in pictures for t in texts]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)
    answers = [output.outputs[0].text.strip() for output in outputs]
    honest = 0
    for place, (name, picture) in enumerate(pictures):
        own = answers[place * len(texts) : (place + 1) * len(texts)]
        honest += sum(answer == NOTHING for answer in own)
        others = sorted({answer for answer in own if answer != NOTHING})
        size = f"{picture.width}x{picture.height}"
        print(f"{name:20} {size:10} {sum(a == NOTHING for a in own)} of {len(own)}  {' / '.join(others)}")
    share = 100 * honest / len(answers)
    print(
        f"{len(pictures)} photographs, {len(texts)} questions each: {share:.1f} % answered with {NOTHING!r}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
