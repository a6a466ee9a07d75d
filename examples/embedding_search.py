"""Search a folder of pictures by words: an index of embeddings with numpy, and queries.

    python examples/embedding_search.py                      # draws 200 pictures first
    python examples/embedding_search.py --folder photos/ --model Qwen/Qwen2-VL-2B-Instruct \
        --aspect "Summary of the above in one word:" "A cat on a sofa."

Any model that answers can be used so (E5-V, Jiang et al. 2024): asked for one word about a picture or about a
sentence, its last state is that word, whichever it was shown. The tiny models know no word for a whole
picture, so they are asked for two, and a vector is two put together. A model that was trained for embeddings
(dse-qwen2, VLM2Vec) does without: openai_chat_embedding_client_for_multimodal.py.

The index is a file beside the pictures; where it is there, only new pictures are embedded.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from opsin import LLM

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""Qwen2-VL's."""
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
ASPECTS = ("What colour is the shape?", "What shape is it?")
COLOURS = ("red", "green", "blue", "yellow", "purple")
QUERIES = ("A red circle.", "A blue square.", "A yellow triangle.", "A green circle.")
BATCH = 50


def draw_folder(folder: Path, count: int = 200) -> None:
    """One shape a picture, of a random colour, size and place; the file's name says what it is."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for number in range(count):
        shape, colour = rng.choice(("circle", "square", "triangle")), rng.choice(COLOURS)
        canvas = Image.new("RGB", (112, 112), (rng.randint(110, 150),) * 3)
        x, y, r = rng.randint(35, 77), rng.randint(35, 77), rng.randint(14, 22)
        pen = ImageDraw.Draw(canvas)
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        else:
            pen.regular_polygon((x, y, r), 4 if shape == "square" else 3, fill=colour)
        canvas.save(folder / f"{number:03}-{colour}-{shape}.png")


def embedded(llm: LLM, prompts: Sequence[object]) -> np.ndarray:
    """Vectors of length 1: (prompts, hidden), float32."""
    outputs = llm.embed(list(prompts), use_tqdm=False)
    vectors = np.array([output.outputs.embedding for output in outputs], dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def of_pictures(llm: LLM, paths: Sequence[Path], aspects: Sequence[str]) -> np.ndarray:
    """A row for each picture: (pictures, aspects * hidden)."""
    rows = []
    for start in tqdm(range(0, len(paths), BATCH), desc="indexing", unit=f" x {BATCH} pictures"):
        pictures = [Image.open(path) for path in paths[start : start + BATCH]]
        parts = []
        for aspect in aspects:
            text = PROMPT.format(PICTURE + aspect)
            prompts = [{"prompt": text, "multi_modal_data": {"image": picture}} for picture in pictures]
            parts.append(embedded(llm, prompts))
        rows.append(np.concatenate(parts, axis=1))
    return np.concatenate(rows)


def of_query(llm: LLM, query: str, aspects: Sequence[str]) -> np.ndarray:
    """The row of a description: (aspects * hidden,)."""
    return embedded(llm, [PROMPT.format(f"{query} {aspect}") for aspect in aspects]).flatten()


def indexed(llm: LLM, folder: Path, aspects: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    """All pictures of a folder and their vectors; what the index knows already is not computed again."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    file = folder / "index.npz"
    known: dict[str, np.ndarray] = {}
    if file.exists():
        kept = np.load(file)
        known = dict(zip(kept["names"].tolist(), kept["vectors"], strict=True))
    if missing := [path for path in paths if path.name not in known]:
        vectors = of_pictures(llm, missing, aspects)
        known |= {path.name: row for path, row in zip(missing, vectors, strict=True)}
        np.savez(file, names=list(known), vectors=np.stack(list(known.values())))
    return paths, np.stack([known[path.name] for path in paths])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("query", nargs="*", help=f"what to look for (default: {', '.join(QUERIES)})")
    parser.add_argument("--folder", type=Path, default=Path("drawn-pictures"), help="%(default)s")
    parser.add_argument("--model", default="opsin/tiny-qwen2vl", help="%(default)s")
    parser.add_argument(
        "--aspect",
        action="append",
        help=f"what to ask of picture and query (default: {' and '.join(ASPECTS)})",
    )
    parser.add_argument("--top", type=int, default=5, help="pictures to show for a query (%(default)s)")
    args = parser.parse_args()
    if not args.folder.exists():
        draw_folder(args.folder)
    aspects = args.aspect or ASPECTS
    llm = LLM(args.model, task="embed")
    paths, vectors = indexed(llm, args.folder, aspects)
    for query in args.query or QUERIES:
        scores = vectors @ of_query(llm, query, aspects) / len(aspects)
        print(query)
        for place in np.argsort(-scores)[: args.top]:
            print(f"  {scores[place]:.3f}  {paths[place].name}")


if __name__ == "__main__":
    main()
