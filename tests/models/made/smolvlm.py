"""Tiny Idefics3 and SmolVLM checkpoints by transformers' classes, and what these make of a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata

from tests.models.made.theirs import Inputs, Media, Theirs, random_weights
from tests.models.made.tiny_tokenizers import gpt2_splitter, trained

TEXT: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
VISION: Mapping[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
EDGE = 128
CORPUS = (
    "You are provided the following series of three frames from a 0:00:07 [H:MM:SS] video.\n\n"
    "Frame from 00:01:\nUser: What is shown in this picture? Assistant: A cup of coffee.\n",
) * 20
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"),
    *("<global-img>", "<video>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)
NAMED = {
    "bos_token": "<|im_start|>",
    "eos_token": "<end_of_utterance>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}
HUB_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The template of the published checkpoints, which knows no videos."""

WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 8: "eight", 12: "twelve", 21: "twenty-one"}
"""num2words, which the processor wants, is not a tool of this repository."""


class SmolVLM(Theirs):
    """A checkpoint of either architecture.

    Args:
        folder: where it is written.
        idefics: Idefics3 rather than SmolVLM.
        text, vision, changes: of the configuration.
        settings: of preprocessor_config.json.
        template: chat template; None: none.
        special: special tokens of the tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        idefics: bool = False,
        text: Mapping[str, Any] | None = None,
        vision: Mapping[str, Any] | None = None,
        changes: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        template: str | None = HUB_TEMPLATE,
        special: Sequence[str] = SPECIAL,
    ) -> None:
        self.tokenizer = trained(gpt2_splitter(), CORPUS, special, NAMED)
        if template is not None:
            self.tokenizer.chat_template = template
        size = -(-len(self.tokenizer) // 8) * 8
        config = (Idefics3Config if idefics else SmolVLMConfig)(
            text_config={**TEXT, "vocab_size": size, **(text or {})},
            vision_config={**VISION, **(vision or {})},
            image_token_id=self.tokenizer.convert_tokens_to_ids("<image>"),
            **(changes or {}),
        )
        config._attn_implementation = "eager"
        kind = Idefics3ForConditionalGeneration if idefics else SmolVLMForConditionalGeneration
        self.model: Any = kind(config).eval()
        random_weights(self.model)
        self.save(folder)

        given = {
            "size": {"longest_edge": EDGE},
            "max_image_size": {"longest_edge": config.vision_config.image_size},
            **(settings or {}),
        }
        images = Idefics3ImageProcessorPil if idefics else SmolVLMImageProcessorPil
        self.images: Any = images(**{key: given[key] for key in given if key != "video_sampling"})
        self.sampling = given.get("video_sampling")
        self.video_size = (given.get("video_sampling") or {}).get("video_size", given["size"])
        side = given["max_image_size"]["longest_edge"] // config.vision_config.patch_size
        self.per_square = (side // config.scale_factor) ** 2
        self.idefics = idefics
        if idefics:
            self.processor: Any = Idefics3Processor(
                self.images, self.tokenizer, image_seq_len=self.per_square
            )
        written = {**self.images.to_dict(), **given}
        (folder / "preprocessor_config.json").write_text(json.dumps(written, indent=2, default=str))
        (folder / "processor_config.json").write_text(json.dumps({"image_seq_len": self.per_square}))

    def inputs(self, text: str, media: Media, **options: Any) -> Inputs:
        """See `Theirs.inputs`; videos are ``(frames, fps)`` or frames alone."""
        if self.idefics:
            images = media.get("image") or None
            made = dict(self.processor(text=text, images=images, return_tensors="pt", **options))
            return Inputs(made["input_ids"], {k: made[k] for k in made if k.startswith("pixel")})
        pieces, squares, start = [], [], 0
        left = {kind: list(items) for kind, items in media.items()}
        while True:
            found = [(text.find(mark, start), mark) for mark in ("<image>", "<video>")]
            at, mark = min(((at, mark) for at, mark in found if at >= 0), default=(-1, ""))
            if at < 0:
                break
            item = left[mark.strip("<>")].pop(0)
            written, values = self._image(item, options) if mark == "<image>" else self._video(item)
            pieces += [text[start:at], written]
            squares += values
            start = at + len(mark)
        assert not any(left.values())
        whole = "".join([*pieces, text[start:]])
        ids = self.tokenizer(whole, return_tensors="pt")["input_ids"]
        return Inputs(ids, {"pixel_values": torch.stack(squares)[None]} if squares else {})

    @property
    def _self(self) -> SimpleNamespace:
        """What the processor's methods read; the class itself cannot be made without torchvision."""
        return SimpleNamespace(
            image_seq_len=self.per_square,
            fake_image_token="<fake_token_around_image>",
            image_token="<image>",
            global_image_token="<global-img>",
        )

    def _image(self, image: Image.Image, options: Mapping[str, Any]) -> tuple[str, list[torch.Tensor]]:
        made = self.images(image, return_tensors="pt", return_row_col_info=True, **options)
        text = processing_smolvlm.SmolVLMProcessor.replace_image_token(self._self, made, 0)
        return text, list(made["pixel_values"][0])

    def _video(self, video: Any) -> tuple[str, list[torch.Tensor]]:
        frames, fps = video if isinstance(video, tuple) else (video, None)
        count = len(frames)
        metadata = VideoMetadata(
            total_num_frames=count,
            fps=fps,
            duration=None if fps is None else count / fps,
            frames_indices=list(range(count)),
        )
        sampling = self.sampling
        if fps is not None and sampling is not None:
            chosen = SmolVLMVideoProcessor.sample_frames(
                SimpleNamespace(num_frames=sampling["max_frames"], fps=sampling["fps"]), metadata
            )
            metadata.frames_indices = chosen.tolist()
            frames = [frames[index] for index in chosen]
        made = [
            self.images(frame, return_tensors="pt", do_image_splitting=False, size=self.video_size)
            for frame in frames
        ]
        values = [part["pixel_values"][0, 0] for part in made]
        given = {"pixel_values": torch.stack(values)[None], "video_metadata": [metadata]}
        before = processing_smolvlm.num2words
        processing_smolvlm.num2words = WORDS.__getitem__
        try:
            text = processing_smolvlm.SmolVLMProcessor.replace_video_token(self._self, given, 0)
        finally:
            processing_smolvlm.num2words = before
        return text, values


def frames_of(names: Sequence[Image.Image], size: tuple[int, int] = (60, 44)) -> list[np.ndarray[Any, Any]]:
    """Frames of one size."""
    return [np.asarray(image.convert("RGB").resize(size)) for image in names]
