"""Tiny InternVL checkpoints by transformers' classes, and what these make of a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor

from tests.models.made.theirs import Inputs, Media, Theirs, random_weights
from tests.models.made.tiny_tokenizers import qwen_splitter, trained

SIDE = 56
TEXT: Mapping[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
VISION: Mapping[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "attention_bias": True,
    "image_size": [SIDE, SIDE],
    "patch_size": [14, 14],
}
CORPUS = (
    "Frame1: \nFrame2: \nFrame3: \nWhat is shown in this picture? A cup of coffee, and a rocket.\n"
    "<|im_start|>user\nDescribe the video: what happens?<|im_end|>\n<|im_start|>assistant\n",
) * 20
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"),
    "<video>",
)
NAMED = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "extra_special_tokens": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}
HUB_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
"""The template of the published checkpoints."""


class InternVL(Theirs):
    """A checkpoint.

    Args:
        folder: where it is written.
        text, vision, changes: of the configuration.
        settings: of preprocessor_config.json.
        own_keys: stored under the keys of transformers' modules rather than those of the hub's files.
        template: chat template; None: none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        text: Mapping[str, Any] | None = None,
        vision: Mapping[str, Any] | None = None,
        changes: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        own_keys: bool = False,
        template: str | None = HUB_TEMPLATE,
    ) -> None:
        self.tokenizer = trained(qwen_splitter(), CORPUS, SPECIAL, NAMED)
        if template is not None:
            self.tokenizer.chat_template = template
        size = -(-len(self.tokenizer) // 8) * 8
        config = InternVLConfig(
            text_config={**TEXT, "vocab_size": size, **(text or {})},
            vision_config={**VISION, **(vision or {})},
            image_token_id=self.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=4,
            **(changes or {}),
        )
        config._attn_implementation = "eager"
        self.model: Any = InternVLForConditionalGeneration(config).eval()
        random_weights(self.model)
        self.save(folder)
        if own_keys:
            state = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
            if config.tie_word_embeddings:
                del state["lm_head.weight"]
            save_file(state, folder / "model.safetensors")

        given = {
            "size": {"height": SIDE, "width": SIDE},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "crop_to_patches": False,
            **(settings or {}),
        }
        self.images: Any = GotOcr2ImageProcessorPil(**given)
        (folder / "preprocessor_config.json").write_text(
            json.dumps({**self.images.to_dict(), **given}, indent=2, default=str)
        )
        (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": 4}))

    def inputs(self, text: str, media: Media, **options: Any) -> Inputs:
        """See `Theirs.inputs`."""
        pieces, tiles, start = [], [], 0
        left = {kind: list(items) for kind, items in media.items()}
        while True:
            found = [(text.find(mark, start), mark) for mark in ("<IMG_CONTEXT>", "<video>")]
            at, mark = min(((at, mark) for at, mark in found if at >= 0), default=(-1, ""))
            if at < 0:
                break
            if mark == "<video>":
                frames = left["video"].pop(0)
                made = self.images(list(frames), return_tensors="pt", crop_to_patches=False)
                given: Any = {"pixel_values_videos": [made["pixel_values"]]}
                written = InternVLProcessor.replace_video_token(self._self, given, 0)
            else:
                picture = left["image"].pop(0)
                made = self.images(picture, return_tensors="pt", **{"crop_to_patches": True, **options})
                written = InternVLProcessor.replace_image_token(self._self, made, 0)
            pieces += [text[start:at], written]
            tiles.append(made["pixel_values"])
            start = at + len(mark)
        assert not any(left.values())
        ids = self.tokenizer("".join([*pieces, text[start:]]), return_tensors="pt")["input_ids"]
        return Inputs(ids, {"pixel_values": torch.cat(tiles)} if tiles else {})

    @property
    def _self(self) -> SimpleNamespace:
        """What the processor's methods read; the class itself cannot be made without torchvision."""
        return SimpleNamespace(
            image_seq_length=4,
            start_image_token="<img>",
            end_image_token="</img>",
            image_token="<IMG_CONTEXT>",
        )
