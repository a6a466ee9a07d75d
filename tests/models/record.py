"""Records cases of families that transformers has: ``python -m tests.models.record qwen25vl qwen3vl``.

A tiny checkpoint of random weights is made by transformers' own classes and saved as the hub's are; then
transformers says what it gives on the cases. Nothing of opsin is used. Where transformers 5 departs from the
family's first release (docs/decisions/0090), the release's rules stand here, once more and in plain loops:
`_positions`, `_video_text`. Videos: transformers' processors of videos want torchvision, so frames go through
its PIL processor of pictures, one by one.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = GOLDEN / "qwen2vl" / "model"
IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
NUM_STEPS = 16
CLEAR = 0.01
"""Between the two best logits, so that rounding does not decide."""

IDS = {"image_token_id": 572, "video_token_id": 573, "vision_start_token_id": 569, "vision_end_token_id": 570}
TEXT: Mapping[str, Any] = {
    "vocab_size": 608,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 560,
    "eos_token_id": 562,
}


@dataclass(frozen=True)
class Recorded:
    """A family.

    Attributes:
        config: config.json as the hub has it, tiny.
        model: transformers' classes.
        hub_names: prefixes of keys in memory -> in the hub's files.
        image, video: settings of the processors.
        template: of chats.
        timed: whether each step of a video is a picture of its own, behind its time in words.
    """

    config: Mapping[str, Any]
    model: tuple[Any, Any]
    image: Mapping[str, Any]
    video: Mapping[str, Any]
    template: str
    hub_names: Mapping[str, str] = field(default_factory=dict)
    timed: bool = False


_PARTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}"
    + IMAGE
    + "{% elif part['type'] == 'video' or 'video' in part %}"
    + VIDEO
    + ""
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
)
_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

FAMILIES = {
    "qwen25vl": Recorded(
        config={
            **TEXT,
            **IDS,
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_window_layers": 3,
            "use_sliding_window": False,
            "sliding_window": 2048,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vision_config": {
                "depth": 3,
                "hidden_act": "silu",
                "hidden_size": 64,
                "intermediate_size": 92,
                "num_heads": 4,
                "in_chans": 3,
                "out_hidden_size": 64,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "window_size": 56,
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
                "temporal_patch_size": 2,
            },
        },
        model=(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
        hub_names={"model.language_model.": "model.", "model.visual.": "visual."},
        image={
            "min_pixels": 3136,
            "max_pixels": 31360,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
        video={},
        template="{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n" + _PARTS + "{% endfor %}" + _END,
    ),
    "qwen3vl": Recorded(
        config={
            **IDS,
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "tie_word_embeddings": True,
            "text_config": {
                **TEXT,
                "attention_bias": False,
                "dtype": "bfloat16",
                "head_dim": 16,
                "model_type": "qwen3_vl_text",
                "num_attention_heads": 6,
                "num_hidden_layers": 4,
                "rope_scaling": {
                    "mrope_interleaved": True,
                    "mrope_section": [4, 2, 2],
                    "rope_type": "default",
                },
                "rope_theta": 5000000,
                "tie_word_embeddings": True,
            },
            "vision_config": {
                "deepstack_visual_indexes": [0, 1, 3],
                "depth": 4,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 64,
                "in_channels": 3,
                "intermediate_size": 96,
                "model_type": "qwen3_vl",
                "num_heads": 4,
                "num_position_embeddings": 64,
                "out_hidden_size": 64,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        model=(Qwen3VLConfig, Qwen3VLForConditionalGeneration),
        image={
            "size": {"longest_edge": 40960, "shortest_edge": 4096},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        video={
            "size": {"longest_edge": 40960, "shortest_edge": 4096},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Qwen3VLProcessor",
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
        template="{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        + _PARTS
        + "{% endfor %}"
        + _END,
        timed=True,
    ),
}

_FILM = [f"video_{n}_112x84.png" for n in range(6)]
_IMAGE, _VIDEO = {"type": "image"}, {"type": "video"}


def _asks(*parts: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


CASES: Mapping[str, Mapping[str, Any]] = {
    "text_only": {"messages": [_asks("What is a cup of coffee?")]},
    "single_image": {
        "messages": [_asks(_IMAGE, "What is shown in this image?")],
        "images": ["coffee_320x213.png"],
    },
    "multi_image": {
        "messages": [_asks(_IMAGE, _IMAGE, "Compare the two images.")],
        "images": ["cat_150x240.png", "rocket_400x80.png"],
    },
    "multi_turn": {
        "messages": [
            {"role": "system", "content": "You look at pictures."},
            _asks(_IMAGE, "What is it?"),
            {"role": "assistant", "content": "A cat."},
            _asks("And this?", _IMAGE),
        ],
        "images": ["cat_150x240.png", "astronaut_96x96.png"],
    },
    "video": {"messages": [_asks(_VIDEO, "What is shown in the video?")], "videos": [_FILM]},
    "long_video": {  # more steps of time than rows or columns; an odd last frame
        "messages": [_asks(_VIDEO, "What is shown in the video?")],
        "videos": [[*_FILM, *_FILM[::-1], *_FILM[1:4]]],
    },
    "image_and_video": {
        "messages": [_asks(_IMAGE, _VIDEO, "Compare the image with the video.")],
        "images": ["astronaut_96x96.png"],
        "videos": [_FILM[:4]],
    },
}


# ---- a checkpoint ---------------------------------------------------------------------------------


def write_checkpoint(folder: Path, family: Recorded, config: Mapping[str, Any] | None = None) -> None:
    """A folder as the hub has it; ``config``: another config.json of the family."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        shutil.copy(TOKENIZER / name, folder)
    tokenizer = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template")
    end = [TEXT["eos_token_id"], TEXT["bos_token_id"]]
    files = {
        "config.json": config or family.config,
        "tokenizer_config.json": tokenizer,
        "preprocessor_config.json": family.image,
        "video_preprocessor_config.json": family.video,
        "chat_template.json": {"chat_template": family.template},
        "generation_config.json": {"do_sample": False, "eos_token_id": end},
    }
    for name, content in files.items():
        if content:
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    save_file(random_weights(family, config or family.config), folder / "model.safetensors")


def random_weights(family: Recorded, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """bfloat16 weights under the hub's keys, large enough that pictures matter."""
    config_class, model_class = family.model
    with torch.device("meta"):
        model = model_class(config_class(**json.loads(json.dumps(config))))
    random = torch.Generator().manual_seed(7)
    found = {}
    for key, empty in model.state_dict().items():
        noise = torch.randn(empty.shape, generator=random)
        norm = "norm" in key.rsplit(".", 2)[-2] or "ln_q" in key
        weight = 1 + 0.1 * noise if norm and key.endswith("weight") else 0.15 * noise
        if key == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        old = next((prefix for prefix in family.hub_names if key.startswith(prefix)), "")
        found[family.hub_names.get(old, "") + key.removeprefix(old)] = weight.to(torch.bfloat16)
    return found


# ---- what transformers gives ------------------------------------------------------------------------


class Theirs:
    """transformers' model and processor of pictures on a folder."""

    def __init__(self, folder: Path, family: Recorded) -> None:
        self.family = family
        config_class, model_class = family.model
        config = config_class.from_pretrained(folder)
        self.model = model_class.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.config = config
        self.merge = config.vision_config.spatial_merge_size

    def images(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Rows of patches, and grids."""
        given = Qwen2VLImageProcessorPil(**self.family.image)(images=list(pictures), return_tensors="pt")
        return given["pixel_values"], [tuple(grid) for grid in given["image_grid_thw"].tolist()]

    def video(self, frames: Sequence[Image.Image]) -> tuple[Tensor, tuple[int, int, int]]:
        """The same of one video, frame by frame."""
        settings = dict(self.family.video or self.family.image)
        span = self.config.vision_config.temporal_patch_size
        frames = [*frames, *[frames[-1]] * (-len(frames) % span)] if not self.family.timed else list(frames)
        if self.family.timed:
            width, height = frames[0].size
            size = settings["size"]
            tall, wide = smart_resize(
                len(frames),
                height,
                width,
                temporal_factor=span,
                factor=settings["patch_size"] * settings["merge_size"],
                min_pixels=size["shortest_edge"],
                max_pixels=size["longest_edge"],
            )
            frames = [frame.resize((wide, tall), Image.Resampling.BICUBIC) for frame in frames]
            frames += [frames[-1]] * (-len(frames) % span)
            settings |= {"do_resize": False}
        rows = []
        for frame in frames:
            one = Qwen2VLImageProcessorPil(**settings)(images=[frame], return_tensors="pt")
            rows.append(one["pixel_values"].unflatten(1, (3, span, -1)))  # the frame, span times
            _, height, width = one["image_grid_thw"][0].tolist()
        steps = [
            torch.stack([rows[first + i][:, :, i] for i in range(span)], dim=2)
            for first in range(0, len(rows), span)
        ]
        return torch.cat(steps).flatten(1), (len(steps), height, width)

    def expanded(self, prompt: str, images: Sequence[Any], videos: Sequence[Any], times: Any) -> str:
        """The prompt with as many pad tokens as there are embeddings."""
        for _, height, width in images:
            count = height * width // self.merge**2
            prompt = prompt.replace("<|image_pad|>", "<|X|>" * count, 1)
        for (steps, height, width), seconds in zip(videos, times):
            count = height * width // self.merge**2
            if self.family.timed:
                prompt = prompt.replace(VIDEO, _video_text(seconds, steps, count), 1)
            else:
                prompt = prompt.replace("<|video_pad|>", "<|Y|>" * steps * count, 1)
        return prompt.replace("<|X|>", "<|image_pad|>").replace("<|Y|>", "<|video_pad|>")

    def inputs(
        self,
        prompt: str,
        pictures: Sequence[Image.Image] = (),
        films: Sequence[Sequence[Image.Image]] = (),
        times: Sequence[Sequence[float]] | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of a forward pass; ``times`` of each film's frames, or 2 a second."""
        given: dict[str, Any] = {}
        image_grids: list[tuple[int, int, int]] = []
        video_grids: list[tuple[int, int, int]] = []
        if pictures:
            given["pixel_values"], image_grids = self.images(pictures)
            given["image_grid_thw"] = torch.tensor(image_grids)
        if films:
            mapped = [self.video(frames) for frames in films]
            given["pixel_values_videos"] = torch.cat([rows for rows, _ in mapped])
            video_grids = [grid for _, grid in mapped]
            given["video_grid_thw"] = torch.tensor(video_grids)
        seconds = times or [[n / 2 for n in range(len(film))] for film in films]
        text = self.expanded(prompt, image_grids, video_grids, seconds)
        ids = self.tokenizer(text)["input_ids"]
        given["input_ids"] = torch.tensor([ids])
        given["position_ids"] = _positions(self, ids, image_grids, video_grids, seconds).unsqueeze(1)
        return given

    @torch.inference_mode()
    def logits(self, inputs: Mapping[str, Any], more: Sequence[int] = ()) -> Tensor:
        """(L + more, V), all in one uncached pass."""
        longer = dict(inputs)
        last = int(inputs["position_ids"].max())
        beyond = torch.arange(last + 1, last + 1 + len(more)).expand(3, 1, -1)
        ids = torch.tensor([more], dtype=torch.int64)
        longer["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        longer["position_ids"] = torch.cat([inputs["position_ids"], beyond], dim=2)
        output = self.model(**longer, use_cache=False, output_hidden_states=True)
        self.last_hidden = output.hidden_states[-1][0]
        logits: Tensor = output.logits[0]
        return logits

    def greedy(self, inputs: Mapping[str, Any], count: int) -> list[int]:
        """The best tokens, each step recomputed."""
        chosen: list[int] = []
        for _ in range(count):
            chosen.append(int(self.logits(inputs, chosen)[-1].argmax()))
        return chosen


def _video_text(times: Sequence[float], steps: int, count: int) -> str:
    """As the family's first processor wrote a video (transformers 4.57): times, marks around each step."""
    frames = [*times, times[-1]]
    text = ""
    for step in range(steps):
        seconds = (frames[2 * step] + frames[2 * step + 1]) / 2
        text += f"<{seconds:.1f} seconds><|vision_start|>" + "<|Y|>" * count + "<|vision_end|>"
    return text


def _positions(
    theirs: Theirs, ids: Sequence[int], images: Sequence[Any], videos: Sequence[Any], times: Sequence[Any]
) -> Tensor:
    """int64 (3, L): what follows a medium begins one after the largest position in it."""
    image, video = IDS["image_token_id"], IDS["video_token_id"]
    blocks = {image: iter(images), video: _video_blocks(theirs, videos, times)}
    found: list[tuple[int, int, int]] = []
    at = following = 0
    while at < len(ids):
        if ids[at] not in blocks:
            found.append((following, following, following))
            at, following = at + 1, following + 1
            continue
        steps, height, width, *apart = next(blocks[ids[at]])
        scale = apart[0] if apart else torch.tensor(1.0)
        start = following
        for step in range(steps):
            for row in range(height // theirs.merge):
                for column in range(width // theirs.merge):
                    found.append((start + int(step * scale), start + row, start + column))
                    at += 1
        following = max(max(places) for places in found) + 1
    return torch.tensor(found).T


def _video_blocks(theirs: Theirs, videos: Sequence[Any], times: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    for (steps, height, width), seconds in zip(videos, times):
        if theirs.family.timed:
            yield from [(1, height, width)] * steps
        else:
            between = (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)
            per_step = torch.tensor(theirs.config.vision_config.temporal_patch_size * between)
            yield steps, height, width, per_step * theirs.config.vision_config.tokens_per_second


# ---- recording ----------------------------------------------------------------------------------------


def open_picture(name: str) -> Image.Image:
    return Image.open(GOLDEN / "images" / name).convert("RGB")


def record(name: str) -> None:
    """Write tests/golden/``name``."""
    family = FAMILIES[name]
    home = GOLDEN / name
    write_checkpoint(home / "model", family)
    keys = sorted(random_weights(family, family.config))
    (home / "weight_keys.json").write_text(json.dumps(keys, indent=2) + "\n")
    theirs = Theirs(home / "model", family)
    render: Callable[..., Any] = theirs.tokenizer.apply_chat_template
    for case, given in CASES.items():
        images, videos = given.get("images", []), given.get("videos", [])
        prompt = render(
            given["messages"], chat_template=family.template, tokenize=False, add_generation_prompt=True
        )
        inputs = theirs.inputs(
            prompt,
            [open_picture(image) for image in images],
            [[open_picture(frame) for frame in video] for video in videos],
        )
        ids = inputs["input_ids"][0].tolist()
        tokens = theirs.greedy(inputs, NUM_STEPS)
        logits = theirs.logits(inputs, tokens[:-1])
        steps = logits[len(ids) - 1 :]
        best = steps.topk(2).values
        unclear = ((best[:, 0] - best[:, 1]) < CLEAR).nonzero().flatten().tolist()
        theirs.logits(inputs)
        pooled = torch.nn.functional.normalize(theirs.last_hidden[-1], dim=0)
        before = logits[: len(ids) - 1].log_softmax(-1)
        tensors = {
            "step_logits": steps,
            "prompt_logprobs": before.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1),
            "pooled_last_l2": pooled,
        }
        folder = home / "cases" / case
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "tensors.safetensors"
        )
        content = {
            "family": name,
            "case": case,
            "model_dir": "../../model",
            "image_dir": "../../../images",
            "reference": {
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "attn": "eager",
                "dtype": "float32",
            },
            "messages": given["messages"],
            "prompt": prompt,
            "images": images,
            "videos": videos,
            "prompt_token_ids_unexpanded": theirs.tokenizer(prompt)["input_ids"],
            "prompt_token_ids": ids,
            "mrope_position_delta": int(inputs["position_ids"].max()) + 1 - len(ids),
            "greedy_token_ids": tokens,
            "greedy_safe_len": min([NUM_STEPS, *unclear]),
            "tensors": {key: {"stored": "full", "shape": list(t.shape)} for key, t in tensors.items()},
        }
        (folder / "case.json").write_text(json.dumps(content, indent=1) + "\n")
        print(name, case, len(ids), "tokens; safe for", content["greedy_safe_len"], "steps")


if __name__ == "__main__":
    for family_name in sys.argv[1:] or FAMILIES:
        record(family_name)
