"""The whole model against transformers' own, on checkpoints built here in the hub's layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from opsin import LLM, BeamSearchParams, SamplingParams
from opsin.testing.models import process, recorded_logits

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


def build_checkpoint(folder: Path, *, tied: bool, **changes: Any) -> Path:
    """Random weights under the hub's keys, beside the tokenizer files of the recorded checkpoint."""
    source = GOLDEN / "qwen2vl" / "model"
    for file in source.iterdir():
        if file.suffix in {".json", ".txt"}:
            shutil.copy(file, folder)
    config = json.loads((source / "config.json").read_text())
    config.update(tie_word_embeddings=tied, **changes)
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inter, kv = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"]
    head = hidden // config["num_attention_heads"]
    vision = config["vision_config"]
    width, wide = vision["embed_dim"], vision["embed_dim"] * 4
    mlp = width * vision["mlp_ratio"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "visual.patch_embed.proj.weight": (width, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (width,),
        "visual.merger.ln_q.bias": (width,),
        "visual.merger.mlp.0.weight": (wide, wide),
        "visual.merger.mlp.0.bias": (wide,),
        "visual.merger.mlp.2.weight": (hidden, wide),
        "visual.merger.mlp.2.bias": (hidden,),
    }
    if not tied:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        for name, rows in (("q", hidden), ("k", kv * head), ("v", kv * head)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (inter, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inter)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    for n in range(vision["depth"]):
        block = f"visual.blocks.{n}"
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", mlp, width),
            ("mlp.fc2", width, mlp),
        ):
            shapes[f"{block}.{name}.weight"] = (rows, columns)
            shapes[f"{block}.{name}.bias"] = (rows,)
        for name in ("norm1", "norm2"):
            shapes[f"{block}.{name}.weight"] = shapes[f"{block}.{name}.bias"] = (width,)
    random = torch.Generator().manual_seed(5)
    tensors = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=random)
        is_norm = (len(shape) == 1 and "norm" in key.rpartition(".")[0]) or "ln_q" in key
        tensors[key] = 1 + 0.1 * noise if is_norm and key.endswith("weight") else noise * 0.15
    save_file(tensors, folder / "model.safetensors")
    return folder


def pictures(*names: str) -> list[Image.Image]:
    return [Image.open(GOLDEN / "images" / name).convert("RGB") for name in names]


FRAMES = [f"video_{n}_112x84.png" for n in range(4)]


class Theirs:
    """transformers' model and image processor on the same folder."""

    def __init__(self, folder: Path) -> None:
        config = Qwen2VLConfig.from_pretrained(folder)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def inputs(self, ids: list[int], images: list[Image.Image], video_ids: Any = None) -> dict[str, Any]:
        """Keyword arguments of a forward pass over an expanded prompt."""
        given: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        kinds = torch.zeros_like(given["input_ids"])
        kinds[given["input_ids"] == self.model.config.image_token_id] = 1
        given["mm_token_type_ids"] = kinds
        if images:
            given |= dict(self.processor(images=images, return_tensors="pt"))
        return given

    @torch.inference_mode()
    def logits_after(self, inputs: dict[str, Any], tokens: list[int]) -> torch.Tensor:
        """Logits predicting each of ``tokens``, all in one uncached pass."""
        num_prompt = inputs["input_ids"].shape[1]
        more = torch.tensor([tokens[:-1]], dtype=torch.int64)
        longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1)
        logits: torch.Tensor = self.model(**longer, use_cache=False).logits[0, num_prompt - 1 :]
        return logits


@pytest.mark.parametrize(
    "layout",
    [
        {"tied": True},
        {"tied": False},
        {
            "tied": False,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "hidden_size": 128,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "vision_config": {
                "depth": 3,
                "embed_dim": 96,
                "mlp_ratio": 4,
                "num_heads": 6,
                "in_chans": 3,
                "hidden_size": 128,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
    ],
    ids=["tied", "untied", "other-shape"],
)
def test_logits_and_tokens_are_transformers(tmp_path: Path, layout: dict[str, Any]) -> None:
    folder = build_checkpoint(tmp_path, **layout)
    theirs = Theirs(folder)
    images = pictures("coffee_320x213.png", "rocket_400x80.png")
    prompts = [
        {"prompt": "Hello, what a day"},
        {"prompt": f"{IMAGE} what is it?", "multi_modal_data": {"image": images[0]}},
        {"prompt": f"first {IMAGE} second {IMAGE}?", "multi_modal_data": {"image": images}},
    ]
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**23) as llm:
        for prompt in prompts:
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            with recorded_logits(llm) as logits:
                [output] = llm.generate(prompt, params, use_tqdm=False)
            given = prompt.get("multi_modal_data", {}).get("image", [])
            inputs = theirs.inputs(output.prompt_token_ids, given if isinstance(given, list) else [given])
            expected = theirs.logits_after(inputs, output.outputs[0].token_ids)
            assert float((torch.cat(logits) - expected).abs().max()) < 1e-4
            margins = expected.topk(2).values
            clear = (margins[:, 0] - margins[:, 1]) > 1e-3
            agree = expected.argmax(-1) == torch.tensor(output.outputs[0].token_ids)
            assert bool((agree | ~clear).all())


def test_beam_search_is_transformers(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path, tied=True)
    theirs = Theirs(folder)
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**23) as llm:
        prompt = "Hello, what a day"
        ids = list(process(llm, prompt).token_ids)
        [found] = llm.beam_search(prompt, BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True))
        generated = theirs.model.generate(
            torch.tensor([ids]),
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            top_k=None,
            top_p=None,
            temperature=None,
        )
    assert [list(ids) + list(s.tokens[-6:]) for s in found.sequences] == generated.tolist()
