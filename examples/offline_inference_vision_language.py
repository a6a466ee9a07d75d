"""One question about a picture or a video, for each model family, without a server.

    python examples/offline_inference_vision_language.py --model-type qwen2_vl
    python examples/offline_inference_vision_language.py --image cat.jpg \
        --model microsoft/Phi-3.5-vision-instruct

Without --model it takes a tiny checkpoint from this repository, so it runs anywhere in seconds: the family's
trained one (demo/checkpoints), which knows drawings like the one it is shown here, if that is installed; else
one of random weights, which says random words. The checkpoint of --model says its family itself; one whose
prompt is not written down here is asked through its chat template.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from PIL import Image, ImageDraw

from opsin import LLM, SamplingParams

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Family:
    """How a family writes a question about one picture.

    Attributes:
        architecture: what config.json calls it.
        published: a real checkpoint.
        recorded: folder of tests/golden with a tiny one of random weights.
        prompt: with ``{question}``; the placeholder stands where the picture is looked at.
        video_prompt: the same for a video; None: the family takes none.
        trained: name of a tiny one that answers truly, a package of demo/checkpoints; None: there is none.
    """

    architecture: str
    published: str
    recorded: str
    prompt: str
    video_prompt: str | None = None
    trained: str | None = None


QWEN2 = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
FAMILIES = {
    "llava": Family(
        "LlavaForConditionalGeneration",
        "llava-hf/llava-1.5-7b-hf",
        "llava15",
        "USER: <image>\n{question}\nASSISTANT:",
        trained="opsin/tiny-llava",
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava_next",
        "[INST] <image>\n{question} [/INST]",
    ),
    "phi3_v": Family(
        "Phi3VForCausalLM",
        "microsoft/Phi-3.5-vision-instruct",
        "phi3v",
        "<|user|>\n<|image_1|>\n{question}<|end|>\n<|assistant|>\n",
        trained="opsin/tiny-phi3v",
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        "Qwen/Qwen2-VL-2B-Instruct",
        "qwen2vl",
        QWEN2.format("<|vision_start|><|image_pad|><|vision_end|>{question}"),
        QWEN2.format("<|vision_start|><|video_pad|><|vision_end|>{question}"),
        trained="opsin/tiny-qwen2vl",
    ),
    "minicpmv": Family(
        "MiniCPMV",
        "openbmb/MiniCPM-V-2_6",
        "minicpmv26",
        QWEN2.format("(<image>./</image>)\n{question}"),
        trained="opsin/tiny-minicpmv",
    ),
}


def family_name(text: str) -> str:
    """vLLM's examples write llava-next with a hyphen and the others with underscores: either will do."""
    return text.replace("-", "_")


def tiny_model(family: Family) -> str:
    """A checkpoint that needs no download: the trained one if its package is installed."""
    if family.trained and entry_points(group="opsin.checkpoints.v1", name=family.trained):
        return family.trained
    print(f"(a tiny model of random weights, so random words; a real one is {family.published})")
    return str(ROOT / "tests" / "golden" / family.recorded / "model")


def family_of(model: str) -> str | None:
    """The name in `FAMILIES` of a checkpoint's family, as its config.json says it; None for another one."""
    installed = entry_points(group="opsin.checkpoints.v1", name=model)
    folder = Path(next(iter(installed)).load()()) if installed else Path(model).expanduser()
    config = folder / "config.json"
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        config = Path(hf_hub_download(model, "config.json"))
    [architecture, *_] = json.loads(config.read_text())["architectures"]
    return next((name for name, each in FAMILIES.items() if each.architecture == architecture), None)


def draw(colour: str, offset: int = 0) -> Image.Image:
    """A circle on grey."""
    picture = Image.new("RGB", (112, 112), "grey")
    ImageDraw.Draw(picture).ellipse((32 + offset, 32, 80 + offset, 80), fill=colour)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model-type", type=family_name, choices=FAMILIES, help="default: the family of --model, or qwen2_vl"
    )
    parser.add_argument("--model", help="folder, installed checkpoint or hub id (default: a tiny one)")
    parser.add_argument("--modality", choices=("image", "video"), default="image")
    parser.add_argument("--image", type=Path, help="picture to ask about (default: a drawn circle)")
    parser.add_argument("--question", help="what to ask (default: fits the drawing)")
    parser.add_argument("--num-prompts", type=int, default=3, help="prompts in the batch (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    name = args.model_type or (family_of(args.model) if args.model else "qwen2_vl")
    family = FAMILIES[name] if name else None
    template = family and (family.prompt if args.modality == "image" else family.video_prompt)
    if family and template is None:
        parser.error(f"{name} takes no videos")

    media: object
    if args.modality == "video":
        media = [draw("red", offset) for offset in (-24, -16, -8, 0, 8, 16)]
        question = args.question or "Which way does the circle move?"
    else:
        media = Image.open(args.image) if args.image else draw("red")
        question = args.question or "What colour is the circle?"
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    llm = LLM(model=args.model or tiny_model(FAMILIES[name or "qwen2_vl"]))
    # Equal prompts: the picture is encoded once, and all but one share what was computed for the first.
    if template:
        prompt = {
            "prompt": template.format(question=question),
            "multi_modal_data": {args.modality: media},
        }
        outputs = llm.generate([prompt] * args.num_prompts, params)
    else:
        content = [{"type": args.modality, args.modality: media}, {"type": "text", "text": question}]
        outputs = llm.chat([[{"role": "user", "content": content}]] * args.num_prompts, params)
    for output in outputs:
        print(f"{question}  ->  {output.outputs[0].text.strip()!r}")


if __name__ == "__main__":
    main()
