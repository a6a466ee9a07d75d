"""Our LLaVA and LLaVA-NeXT against transformers', on checkpoints of several layouts with random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from opsin import LLM, SamplingParams
from opsin.testing.models import encode, process, recorded_logits, weight_report

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
IMAGE_TOKEN = 600
SIDE = 70
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "image_size": SIDE,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Layout:
    """What a checkpoint is made of.

    Attributes:
        grid: LLaVA-NeXT rather than LLaVA-1.5.
        tower: "clip" or "siglip".
        text: "llama", "mistral" or "qwen2".
        text_changes, changes: further settings of the text model, of the whole.
        own_keys: stored under the keys of transformers' modules, not under the hub's.
    """

    grid: bool
    tower: str
    text: str
    text_changes: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    own_keys: bool = False

    def __str__(self) -> str:
        settings = "-".join(f"{value}" for value in self.changes.values())
        return "-".join(filter(None, ["grid" if self.grid else "square", self.tower, self.text, settings]))

    @property
    def class_token(self) -> int:
        return int(self.tower == "clip")


FULL, DEFAULT = {"vision_feature_select_strategy": "full"}, {"vision_feature_select_strategy": "default"}
MISTRAL = {
    "num_key_value_heads": 2,
    "head_dim": 24,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
}
LAYOUTS = [
    Layout(False, "clip", "llama", {}, DEFAULT),
    Layout(False, "clip", "mistral", {**MISTRAL, "sliding_window": None}, FULL, own_keys=True),
    Layout(False, "siglip", "llama", {"rms_norm_eps": 1e-5}, {**FULL, "vision_feature_layer": -1}),
    Layout(
        False, "siglip", "mistral", {**MISTRAL, "sliding_window": 512}, {**DEFAULT, "vision_feature_layer": 2}
    ),
    Layout(
        False,
        "clip",
        "qwen2",
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
        {"vision_feature_layer": [-3, 0, -1], "multimodal_projector_bias": False},
    ),
    Layout(True, "clip", "mistral", {**MISTRAL, "sliding_window": None}, DEFAULT),
    Layout(True, "clip", "llama", {"num_key_value_heads": 4}, {"vision_feature_layer": -1}, own_keys=True),
    Layout(True, "siglip", "llama", {}, FULL),
]


class Theirs:
    """transformers' model and processor, and the checkpoint of both in a folder."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        tower = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[layout.tower](**TOWER)
        text = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[layout.text](
            **{**TEXT, **layout.text_changes}
        )
        config_class, model_class = (
            (LlavaNextConfig, LlavaNextForConditionalGeneration)
            if layout.grid
            else (LlavaConfig, LlavaForConditionalGeneration)
        )
        more: dict[str, Any] = {}
        if layout.grid:
            more["image_grid_pinpoints"] = [
                [SIDE, 2 * SIDE],
                [2 * SIDE, SIDE],
                [2 * SIDE, 2 * SIDE],
                [SIDE, 3 * SIDE],
            ]
        config = config_class(
            vision_config=tower, text_config=text, image_token_index=IMAGE_TOKEN, **more, **layout.changes
        )
        config._attn_implementation = "eager"
        self.model: Any = model_class(config).eval()
        random = torch.Generator().manual_seed(11)
        for name, parameter in self.model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            parameter.data = 1 + 0.1 * noise if norm else 0.15 * noise
        self.model.tie_weights()
        self.model.save_pretrained(folder)
        if layout.own_keys:
            save_file(
                {k: v.clone() for k, v in self.model.state_dict().items()}, folder / "model.safetensors"
            )

        for file in (GOLDEN / "llava15" / "model").glob("*token*"):
            shutil.copy(file, folder)
        settings: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
        images: Any
        if layout.grid:
            settings |= {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
            images = LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=more["image_grid_pinpoints"])
        elif layout.tower == "clip":
            settings |= {"size": {"shortest_edge": SIDE + 8}, "crop_size": {"height": SIDE, "width": SIDE}}
            images = CLIPImageProcessorPil(**settings)
        else:
            images = SiglipImageProcessorPil(**settings, size={"height": SIDE, "width": SIDE})
        self.processor: Any = (LlavaNextProcessor if layout.grid else LlavaProcessor)(
            image_processor=images,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            patch_size=TOWER["patch_size"],
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=layout.class_token,
        )
        self.processor.save_pretrained(folder)
        assert json.loads((folder / "processor_config.json").read_text())["image_processor"]

    @torch.inference_mode()
    def logits_after(self, inputs: dict[str, Any], tokens: list[int]) -> torch.Tensor:
        """Logits predicting each of ``tokens``, all in one uncached pass."""
        ids = inputs["input_ids"]
        longer = torch.cat([ids, torch.tensor([tokens[:-1]], dtype=torch.int64)], 1)
        more = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        logits: torch.Tensor = self.model(input_ids=longer, use_cache=False, **more).logits[
            0, ids.shape[1] - 1 :
        ]
        return logits


def pictures(*names: str) -> list[Image.Image]:
    return [Image.open(GOLDEN / "images" / name).convert("RGB") for name in names]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_prompts_logits_and_tokens_are_transformers(tmp_path: Path, layout: Layout) -> None:
    theirs = Theirs(tmp_path, layout)
    images = pictures("coffee_320x213.png", "rocket_400x80.png", "cat_150x240.png")
    questions: list[tuple[str, list[Image.Image]]] = [
        ("Hello, what a day", []),
        ("USER: <image>\nWhat is it? ASSISTANT:", images[:1]),
        ("<image><image> and <image>: which?", images),
    ]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    with LLM(str(tmp_path), dtype="float32", kv_cache_memory=2**23) as llm:
        assert not weight_report(llm).unexpected
        for text, given in questions:
            with recorded_logits(llm) as logits:
                prompt = {"prompt": text, "multi_modal_data": {"image": given}}
                [output] = llm.generate(prompt, params, use_tqdm=False)
            inputs = dict(theirs.processor(text=text, images=given or None, return_tensors="pt"))
            assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
            tokens = output.outputs[0].token_ids
            expected = theirs.logits_after(inputs, tokens)
            assert float(expected.abs().max()) > 0.5, "logits near zero would agree by themselves"
            assert float((torch.cat(logits) - expected).abs().max()) < 1e-4
            margins = expected.topk(2).values
            clear = (margins[:, 0] - margins[:, 1]) > 1e-3
            assert bool(((expected.argmax(-1) == torch.tensor(tokens)) | ~clear).all())


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[5]], ids=str)
def test_image_features_are_transformers(tmp_path: Path, layout: Layout) -> None:
    theirs = Theirs(tmp_path, layout)
    images = pictures("coffee_320x213.png", "rocket_400x80.png")
    inputs = dict(theirs.processor(text="<image><image>", images=images, return_tensors="pt"))
    sizes = {"image_sizes": inputs["image_sizes"]} if layout.grid else {}
    with torch.inference_mode():
        expected = theirs.model.model.get_image_features(inputs["pixel_values"], **sizes).pooler_output
    with LLM(str(tmp_path), dtype="float32", kv_cache_memory=2**23) as llm:
        prompt = {"prompt": "<image><image>", "multi_modal_data": {"image": images}}
        mapped = [item.mapped for item in process(llm, prompt).media]
        given = encode(llm, "image", mapped)
    for ours, reference in zip(given, expected, strict=True):
        assert ours.shape == reference.shape
        assert float((ours - reference).abs().max()) < 1e-4
