"""One question about several pictures, for each model family, without a server.

    python examples/offline_inference_vision_language_multi_image.py --model-type qwen2_vl
    python examples/offline_inference_vision_language_multi_image.py --method generate \
        --model microsoft/Phi-3.5-vision-instruct --image a.jpg --image b.jpg \
        --question "What is the content of each image?"

`chat` leaves the placeholders to the framework, and takes any family; with `generate` the prompt has them.
Without --model it takes a tiny checkpoint from this repository, as offline_inference_vision_language.py does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from offline_inference_vision_language import FAMILIES, QWEN2, family_name, family_of, tiny_model
from PIL import Image, ImageDraw

from opsin import LLM, SamplingParams
from opsin.results import RequestOutput


def draw(colour: str, *centres: tuple[int, int]) -> Image.Image:
    """Circles on grey."""
    picture = Image.new("RGB", (112, 112), "grey")
    for x, y in centres:
        ImageDraw.Draw(picture).ellipse((x - 12, y - 12, x + 12, y + 12), fill=colour)
    return picture


def prompt(model_type: str, question: str, num_images: int) -> str:
    """The question with a placeholder for each picture, as the family writes it."""
    if model_type == "phi3_v":
        placeholders = "\n".join(f"<|image_{number}|>" for number in range(1, num_images + 1))
        return f"<|user|>\n{placeholders}\n{question}<|end|>\n<|assistant|>\n"
    if model_type == "qwen2_vl":
        return QWEN2.format("<|vision_start|><|image_pad|><|vision_end|>" * num_images + question)
    if model_type == "minicpmv":
        return QWEN2.format("(<image>./</image>)\n" * num_images + question)
    if model_type == "llava_next":
        return "[INST] " + "<image>\n" * num_images + question + " [/INST]"
    return "USER: " + "<image>\n" * num_images + question + "\nASSISTANT:"


def generate(
    llm: LLM, model_type: str, question: str, images: list[Image.Image], params: SamplingParams
) -> list[RequestOutput]:
    """A prompt with placeholders."""
    return llm.generate(
        {
            "prompt": prompt(model_type, question, len(images)),
            "multi_modal_data": {"image": images},
        },
        params,
    )


def chat(
    llm: LLM, model_type: str, question: str, images: list[Image.Image], params: SamplingParams
) -> list[RequestOutput]:
    """Messages; the family's chat template writes the placeholders."""
    content: list[dict[str, object]] = [{"type": "image_pil", "image_pil": image} for image in images]
    return llm.chat([{"role": "user", "content": [*content, {"type": "text", "text": question}]}], params)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model-type", type=family_name, choices=FAMILIES, help="default: the family of --model, or qwen2_vl"
    )
    parser.add_argument("--model", help="folder, installed checkpoint or hub id (default: a tiny one)")
    parser.add_argument("--method", choices=("generate", "chat"), default="chat")
    parser.add_argument("--image", type=Path, action="append", help="pictures (default: two drawings)")
    parser.add_argument("--question", default="Which picture has more circles?")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    images = [Image.open(path) for path in args.image or ()]
    images = images or [draw("red", (30, 30), (80, 40), (50, 80)), draw("blue", (56, 56))]

    name = args.model_type or (family_of(args.model) if args.model else "qwen2_vl")
    if name is None and args.method == "generate":
        parser.error("this family's prompt is not written down here; leave --method generate out")
    model = args.model or tiny_model(FAMILIES[name or "qwen2_vl"])
    llm = LLM(model=model, limit_mm_per_prompt={"image": len(images)})
    ask = generate if args.method == "generate" else chat
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    for output in ask(llm, name or "", args.question, images, params):
        print(f"{args.question}  ->  {output.outputs[0].text.strip()!r}")


if __name__ == "__main__":
    main()
