"""Pictures and texts as vectors through `opsin serve` and the openai package.

VLM2Vec (Phi-3-vision):

    opsin serve TIGER-Lab/VLM2Vec-Full --task embedding --trust-remote-code --max-model-len 4096 \
        --chat-template examples/template_vlm2vec.jinja
    python examples/openai_chat_embedding_client_for_multimodal.py --model vlm2vec

DSE (Qwen2-VL):

    opsin serve MrLight/dse-qwen2-2b-mrl-v1 --task embedding --trust-remote-code --max-model-len 8192 \
        --chat-template examples/template_dse_qwen2_vl.jinja
    python examples/openai_chat_embedding_client_for_multimodal.py --model dse_qwen2_vl

Without these checkpoints, tests/golden/phi3v/model and tests/golden/qwen2vl/model are tiny ones of the same
make; their weights are random, so the similarities mean nothing. The picture is drawn; --image takes a file.
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types import CreateEmbeddingResponse
from PIL import Image, ImageDraw

SMALLEST = (56, 56)
"""The smallest picture of dse-qwen2: a query in words carries one, as in its training."""


def inline(picture: Image.Image) -> dict[str, Any]:
    """A picture as a part of a message."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    """Words as a part of a message."""
    return {"type": "text", "text": words}


def draw() -> Image.Image:
    """A red circle on grey."""
    picture = Image.new("RGB", (160, 120), "grey")
    ImageDraw.Draw(picture).ellipse((50, 30, 110, 90), fill="red")
    return picture


class Embedder:
    """Embeds messages with the model that the server has."""

    def __init__(self, client: OpenAI) -> None:
        self._client = client
        self._model = client.models.list().data[0].id

    def embed(self, *parts: dict[str, Any]) -> list[float]:
        """One message's vector, of length 1. The openai package itself knows only `input`."""
        response = self._client.post(
            "/embeddings",
            cast_to=CreateEmbeddingResponse,
            body={
                "model": self._model,
                "messages": [{"role": "user", "content": list(parts)}],
                "encoding_format": "float",
            },
        )
        print(f"  {response.usage.prompt_tokens} tokens -> {len(response.data[0].embedding)} numbers")
        return response.data[0].embedding


def vlm2vec(embedder: Embedder, picture: Image.Image) -> tuple[list[float], dict[str, list[float]]]:
    """A picture and captions, as VLM2Vec was trained on them."""
    query = embedder.embed(inline(picture), text("Represent the given image."))
    captions = ("a red circle", "a cat on a sofa")
    return query, {caption: embedder.embed(text(caption)) for caption in captions}


def dse_qwen2_vl(embedder: Embedder, picture: Image.Image) -> tuple[list[float], dict[str, list[float]]]:
    """A document's picture and queries, as dse-qwen2 was trained on them."""
    document = embedder.embed(inline(picture), text("What is shown in this image?"))
    placeholder = inline(Image.new("RGB", SMALLEST))
    queries = ("a red circle", "a cat on a sofa")
    return document, {words: embedder.embed(placeholder, text(f"Query: {words}")) for words in queries}


MODELS = {"vlm2vec": vlm2vec, "dse_qwen2_vl": dse_qwen2_vl}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True, help="which one is being served")
    parser.add_argument("--base-url", default="http://localhost:8000/v1", help="%(default)s")
    parser.add_argument("--api-key", default="none", help="what the server was given as --api-key")
    parser.add_argument("--image", type=Path, help="picture to embed (default: a drawn circle)")
    args = parser.parse_args()

    embedder = Embedder(OpenAI(base_url=args.base_url, api_key=args.api_key))
    picture = Image.open(args.image) if args.image else draw()
    vector, others = MODELS[args.model](embedder, picture)
    for words, other in others.items():
        similarity = sum(a * b for a, b in zip(vector, other))
        print(f"{words!r}: similarity {similarity:.3f}")


if __name__ == "__main__":
    main()
