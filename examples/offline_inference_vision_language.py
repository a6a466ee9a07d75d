"""One question about a picture or a video, for each model family, without a server.

    python examples/offline_inference_vision_language.py --model-type qwen2_vl
    python examples/offline_inference_vision_language.py --model-type phi3_v --image cat.jpg \
        --model microsoft/Phi-3.5-vision-instruct

Without --model it takes a tiny checkpoint from this repository, so it runs anywhere in seconds. The one for
qwen2_vl was trained on drawings like the one it is shown here; the others have random weights and say so in
random words.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from opsin import LLM, SamplingParams

ROOT = Path(__file__).parents[1]
TRAINED = "opsin/tiny-qwen2vl"


@dataclass(frozen=True)
class Family:
    """How a family writes a question about one picture.

    Attributes:
        tiny: checkpoint that needs no download.
        published: a real one.
        prompt: with ``{question}``; the placeholder stands where the picture is looked at.
        video_prompt: the same for a video; None: the family takes none.
    """

    tiny: str
    published: str
    prompt: str
    video_prompt: str | None = None


def recorded(name: str) -> str:
    """A checkpoint of random weights from the tests."""
    return str(ROOT / "tests" / "golden" / name / "model")


QWEN2 = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
FAMILIES = {
    "llava": Family(recorded("llava15"), "llava-hf/llava-1.5-7b-hf", "USER: <image>\n{question}\nASSISTANT:"),
    "llava-next": Family(
        recorded("llava_next"), "llava-hf/llava-v1.6-mistral-7b-hf", "[INST] <image>\n{question} [/INST]"
    ),
    "phi3_v": Family(
        recorded("phi3v"),
        "microsoft/Phi-3.5-vision-instruct",
        "<|user|>\n<|image_1|>\n{question}<|end|>\n<|assistant|>\n",
    ),
    "qwen2_vl": Family(
        TRAINED,
        "Qwen/Qwen2-VL-2B-Instruct",
        QWEN2.format("<|vision_start|><|image_pad|><|vision_end|>{question}"),
        QWEN2.format("<|vision_start|><|video_pad|><|vision_end|>{question}"),
    ),
    "minicpmv": Family(
        recorded("minicpmv26"), "openbmb/MiniCPM-V-2_6", QWEN2.format("(<image>./</image>)\n{question}")
    ),
}


def draw(colour: str, offset: int = 0) -> Image.Image:
    """A circle on grey."""
    picture = Image.new("RGB", (112, 112), "grey")
    ImageDraw.Draw(picture).ellipse((32 + offset, 32, 80 + offset, 80), fill=colour)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-type", choices=FAMILIES, default="qwen2_vl")
    parser.add_argument("--model", help="folder, installed checkpoint or hub id (default: a tiny one)")
    parser.add_argument("--modality", choices=("image", "video"), default="image")
    parser.add_argument("--image", type=Path, help="picture to ask about (default: a drawn circle)")
    parser.add_argument("--question", help="what to ask (default: fits the drawing)")
    parser.add_argument("--num-prompts", type=int, default=3, help="prompts in the batch (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    family = FAMILIES[args.model_type]
    template = family.prompt if args.modality == "image" else family.video_prompt
    if template is None:
        parser.error(f"{args.model_type} takes no videos")
    model = args.model or family.tiny
    if model != TRAINED and args.model is None:
        print(f"({args.model_type}: random weights, so random words; a real one is {family.published})")

    media: object
    if args.modality == "video":
        media = [draw("red", offset) for offset in (-24, -16, -8, 0, 8, 16)]
        question = args.question or "Which way does the circle move?"
    else:
        media = Image.open(args.image) if args.image else draw("red")
        question = args.question or "What colour is the circle?"
    prompt = {
        "prompt": template.format(question=question),
        "multi_modal_data": {args.modality: media},
    }

    llm = LLM(model=model)
    # Equal prompts: the picture is encoded once, and all but one share what was computed for the first.
    outputs = llm.generate(
        [prompt] * args.num_prompts, SamplingParams(temperature=0, max_tokens=args.max_tokens)
    )
    for output in outputs:
        print(f"{question}  ->  {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
