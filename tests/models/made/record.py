"""Records what transformers gives on a tiny checkpoint, in the form of tests/golden.

    python -m tests.models.made.record smolvlm internvl

Values that are recorded already are written again; run it only for a family that is new, or made anew.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE as SMOLVLM_VIDEO_TEMPLATE

from tests.models.golden import GOLDEN, picture
from tests.models.made.internvl import InternVL
from tests.models.made.smolvlm import SmolVLM
from tests.models.made.theirs import Theirs

NUM_STEPS = 16
CLEAR = 0.01
"""Distance of the two best logits from which the greedy token is certain."""


@dataclass(frozen=True)
class Recorded:
    """A case to record.

    Attributes:
        content: the parts of each turn, user and assistant by turns: texts, or "image" and "video" for media.
        images, videos: files in tests/golden/images.
        options: ``mm_processor_kwargs``.
        pooled: whether the embedding of the prompt is recorded, too.
    """

    content: Sequence[Sequence[str]]
    images: Sequence[str] = ()
    videos: Sequence[Sequence[str]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    pooled: bool = False


COFFEE, CAT, ROCKET = "coffee_320x213.png", "cat_150x240.png", "rocket_400x80.png"


def _cases(option: Mapping[str, Any], frames: Sequence[str]) -> dict[str, Recorded]:
    return {
        "text_only": Recorded([["Hello, what a day."]]),
        "single_image": Recorded([["image", "What is shown in this picture?"]], [COFFEE], pooled=True),
        "multi_image": Recorded([["image", "image", "Which one is a cat?"]], [ROCKET, CAT]),
        "image_behind_text": Recorded([["Look at this: ", "image", "What is it?"]], [CAT]),
        "multi_turn": Recorded(
            [["image", "What is it?"], ["A cup of coffee."], ["image", "And this?"]], [COFFEE, ROCKET]
        ),
        "fewer_tiles": Recorded([["image", "What is it?"]], [COFFEE], options=option),
        "video": Recorded([["video", "What happens?"]], videos=[frames]),
        "video_behind_text": Recorded([["What happens?", "video", "Tell me"]], videos=[frames[:2]]),
        "image_and_video": Recorded([["image", "video", "Compare."]], [CAT], [frames]),
    }


def _messages(case: Recorded) -> list[dict[str, Any]]:
    return [
        {
            "role": "assistant" if number % 2 else "user",
            "content": [
                {"type": part} if part in ("image", "video") else {"type": "text", "text": part}
                for part in parts
            ],
        }
        for number, parts in enumerate(case.content)
    ]


def record(family: str, theirs: Theirs, cases: Mapping[str, Recorded], video_template: str | None) -> None:
    """Write the cases of a checkpoint that lies in its place already."""
    for name, case in cases.items():
        messages = _messages(case)
        prompt = theirs.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            chat_template=video_template if case.videos else None,
        )
        media = {
            "image": [picture(file) for file in case.images],
            "video": [[picture(file) for file in files] for files in case.videos],
        }
        inputs = theirs.inputs(prompt, media, **case.options)
        ids = inputs.ids[0].tolist()
        tokens, steps = theirs.greedy(inputs, NUM_STEPS)
        best = steps.topk(2).values
        margins = (best[:, 0] - best[:, 1]).tolist()
        logprobs = theirs.logits(inputs).log_softmax(-1)[:-1]
        tensors = {
            "step_logits": steps.contiguous(),
            "prompt_logprobs": logprobs.gather(1, inputs.ids[0, 1:, None])[:, 0].contiguous(),
        }
        if case.pooled:
            tensors["pooled_last_l2"] = _pooled(theirs, inputs)
        folder = GOLDEN / family / "cases" / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "tensors.safetensors")
        data = {
            "family": family,
            "case": name,
            "model_dir": "../../model",
            "image_dir": "../../../images",
            "reference": {
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "attn": "eager",
                "dtype": "float32",
            },
            "messages": messages,
            "prompt": prompt,
            "images": list(case.images),
            "videos": [list(files) for files in case.videos],
            "mm_processor_kwargs": dict(case.options),
            "prompt_token_ids": ids,
            "greedy_token_ids": tokens,
            "greedy_margins": [round(margin, 5) for margin in margins],
            "greedy_safe_len": next((i for i, m in enumerate(margins) if m < CLEAR), NUM_STEPS),
            "tensors": {
                key: {"shape": list(value.shape), "dtype": "float32", "stored": "full"}
                for key, value in tensors.items()
            },
        }
        (folder / "case.json").write_text(json.dumps(data, indent=1) + "\n")
    with safe_open(GOLDEN / family / "model/model.safetensors", "pt") as file:
        (GOLDEN / family / "weight_keys.json").write_text(json.dumps(sorted(file.keys()), indent=1) + "\n")


@torch.inference_mode()
def _pooled(theirs: Theirs, inputs: Any) -> Tensor:
    hidden = theirs.model.model(input_ids=inputs.ids, use_cache=False, **inputs.media).last_hidden_state
    return torch.nn.functional.normalize(hidden[0, -1], dim=0)


MAKERS: Mapping[str, tuple[Callable[[Path], Theirs], Mapping[str, Any], str | None]] = {
    "smolvlm": (
        lambda folder: SmolVLM(folder, settings={"video_sampling": {"fps": 1, "max_frames": 8}}),
        {"do_image_splitting": False},
        SMOLVLM_VIDEO_TEMPLATE,
    ),
    "internvl": (InternVL, {"max_patches": 3}, None),
}
"""Family -> how its checkpoint is made, an option that makes pictures smaller, the template for videos."""


def main() -> None:
    """Record the families named as arguments."""
    frames = sorted(file.name for file in (GOLDEN / "images").glob("video_*"))[:3]
    for family in sys.argv[1:]:
        make, option, template = MAKERS[family]
        shutil.rmtree(GOLDEN / family, ignore_errors=True)
        folder = GOLDEN / family / "model"
        folder.mkdir(parents=True)
        record(family, make(folder), _cases(option, frames), template)


if __name__ == "__main__":
    main()
