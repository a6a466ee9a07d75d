"""The model: weights of the recorded and of the published checkpoint, and what surrounds it in `LLM`."""

from __future__ import annotations

import json
import re
import shutil
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from opsin import LLM, SamplingParams
from opsin.errors import CheckpointError, MediaError, RequestError
from opsin.testing.models import (
    build_unloaded,
    fill,
    loaded_model,
    process,
    recorded_cases,
    render,
    weight_shapes,
)
from opsin_models_phi3v.model import Phi3V
from opsin_models_phi3v.plugin import CHAT_TEMPLATE

GOLDEN = Path(__file__).parents[3] / "tests" / "golden" / "phi3v"
picture = recorded_cases(GOLDEN, GOLDEN.parent / "images")[0].picture
PICTURES = ["coffee_320x213.png", "rocket_400x80.png"]
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)

# Phi-3.5-vision-instruct's config.json; Phi-3-vision-128k-instruct's differs in its rotary factors.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Phi3VForCausalLM"],
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "hidden_act": "silu",
    "hidden_size": 3072,
    "img_processor": {
        "image_dim_out": 1024,
        "model_name": "openai/clip-vit-large-patch14-336",
        "name": "clip_vision_model",
        "num_img_tokens": 144,
    },
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
NUM_PARAMETERS = 4_146_621_440
"""Published: 4.15 billion in safetensors."""


def build(config: dict[str, Any]) -> Phi3V:
    return build_unloaded(Phi3V, config, torch.bfloat16)


def recorded_config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / "model" / "config.json").read_text())
    return config


def published_keys() -> set[str]:
    """The hub's keys: those of the recorded checkpoint with as many layers as the real one has."""
    found = set()
    for key in json.loads((GOLDEN / "weight_keys.json").read_text()):
        count = 24 if "vision_model" in key else 32
        found |= {re.sub(r"layers\.\d+\.", f"layers.{number}.", key) for number in range(count)}
    return found


# --- weights --------------------------------------------------------------------------------------


def test_every_recorded_key_has_its_place_or_is_known_to_be_unused() -> None:
    model = build(recorded_config())
    names = {key: model.weight_name(key) for key in json.loads((GOLDEN / "weight_keys.json").read_text())}
    used = [name for name in names.values() if name is not None]
    assert sorted(used) == sorted(weight_shapes(model))
    unused = {key for key, name in names.items() if name is None}
    tower = "model.vision_embed_tokens.img_processor.vision_model"
    assert len(unused) == 18
    assert all(key.startswith((f"{tower}.encoder.layers.3.", f"{tower}.post_layernorm.")) for key in unused)


def test_the_published_model_has_its_keys_and_sizes() -> None:
    model = build(PUBLISHED)
    slots = weight_shapes(model)
    keys = published_keys()
    assert len(keys) == 32 * 6 + 24 * 16 + 3 + 7 + 6
    names = {key: model.weight_name(key) for key in keys}
    assert {name for name in names.values() if name is not None} == set(slots)
    assert slots["model.layers.31.self_attn.qkv_proj.weight"] == (9216, 3072)
    assert slots["model.layers.31.mlp.gate_up_proj.weight"] == (16384, 3072)
    assert slots["vision_embed_tokens.img_projection.0.weight"] == (3072, 4096)
    width = 1024
    unused_layer = 4 * (width**2 + width) + 2 * width * 4096 + 4096 + width + 4 * width
    held = sum(prod(shape) for shape in slots.values())
    assert held + unused_layer + 2 * width == NUM_PARAMETERS
    geometry = model.kv_geometry
    assert (geometry.num_layers, geometry.num_kv_heads, geometry.head_size) == (32, 32, 96)


def test_second_names_of_a_tensor_are_passed_over() -> None:
    model = build(recorded_config())
    assert model.weight_name("model.vision_embed_tokens.wte.weight") is None
    key = "model.vision_embed_tokens.img_processor.vision_model.embeddings.position_ids"
    assert fill(model, [(key, torch.zeros(1))]).ignored == [key]
    tied = build({**recorded_config(), "tie_word_embeddings": True})
    assert "lm_head.weight" not in fill(tied, []).missing


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, "hd_transform_order is 'glb_sub'"),
        ({"img_processor": {"type_feature": "cls_patch"}}, "type_feature is 'cls_patch'"),
        ({"vision_config": {"image_size": 224}}, "257 positions"),
        ({"vision_config": {"patch_size": 16}}, "patches of 16 pixels"),
        ({"rope_scaling": {"type": "linear"}}, "factor of rope_scaling"),
        ({"rope_scaling": {**PUBLISHED["rope_scaling"], "type": "yarn"}}, "'yarn' does not use"),
        ({"img_processor": {"layer_idx": 25}}, "24 layers"),
        ({"img_processor": {"image_dim_out": 768}}, "image_dim_out is 768"),
        ({"img_processor": {"num_img_tokens": "144"}}, "num_img_tokens is '144'; expected an integer"),
    ],
)
def test_arrangements_that_are_not_this_familys_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build({**PUBLISHED, **changes})


def test_the_tower_is_read_where_the_config_says() -> None:
    count = len(weight_shapes(build(PUBLISHED)))
    assert len(weight_shapes(build({**PUBLISHED, "img_processor": {"layer_idx": -1}}))) == count + 16
    assert len(weight_shapes(build({**PUBLISHED, "img_processor": {"layer_idx": 20}}))) == count - 3 * 16


# --- through LLM ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM(str(GOLDEN / "model"), dtype="float32", kv_cache_memory=2**24) as loaded:
        yield loaded


def ask(*names: str, text: str = " which?", **more: Any) -> dict[str, Any]:
    marks = "".join(f"<|image_{n + 1}|>\n" for n in range(len(names)))
    return {"prompt": marks + text, "multi_modal_data": {"image": [picture(name) for name in names]}, **more}


def test_pictures_of_one_step_are_encoded_in_one_pass(llm: LLM) -> None:
    model = loaded_model(llm)
    assert isinstance(model, Phi3V)
    media = process(llm, ask(*PICTURES)).media
    together, calls = [item.mapped for item in media], []
    tower = model.vision_embed_tokens.tower
    handle = tower.register_forward_hook(lambda *call: calls.append(call))
    with torch.inference_mode():
        alone = [model.encode("image", [item])[0] for item in together]
        assert len(calls) == 2
        batched = model.encode("image", together)
    handle.remove()
    assert len(calls) == 3
    for one, other in zip(alone, batched, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-5


def test_tags_may_come_in_any_order(llm: LLM) -> None:
    swapped = ask(*PICTURES)
    swapped["prompt"] = "<|image_2|>\n<|image_1|>\n which?"
    reversed_order = process(llm, ask(*reversed(PICTURES)))
    processed = process(llm, swapped)
    assert [item.key for item in processed.media] == [item.key for item in reversed_order.media]
    assert processed.token_ids == reversed_order.token_ids


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<|image_1|> which?", "1 image placeholder.* 2 image"),
        ("<|image_1|><|image_1|> which?", "each of .* once"),
        ("<|image_1|><|image_3|> which?", "image_3"),
        ("<|image_0|><|image_1|> which?", "image_0"),
    ],
)
def test_tags_must_be_one_to_n_each_once(llm: LLM, prompt: str, words: str) -> None:
    for options in ({}, {"tokenize_whole_prompt": True}):
        with pytest.raises(RequestError, match=words):
            llm.generate({**ask(*PICTURES), "prompt": prompt, "mm_processor_kwargs": options}, ONE_TOKEN)


def test_eleven_numbered_pictures_stand_where_their_tags_are() -> None:
    """`<|image_1|>` begins as `<|image_10|>` does; every picture has its own number of tokens."""
    sizes = [(300 + 60 * number, 300) for number in range(11)]
    pictures = [Image.new("RGB", size, (20 * number, 0, 90)) for number, size in enumerate(sizes)]
    prompt = "".join(f"<|image_{number}|> and" for number in range(1, 12))
    settings: dict[str, Any] = {"kv_cache_memory": 2**26, "mm_processor_kwargs": {"num_crops": 4}}
    with LLM(str(GOLDEN / "model"), limit_mm_per_prompt={"image": 11}, **settings) as llm:
        made = [
            process(llm, {"prompt": p, "multi_modal_data": {"image": [image]}})
            for p, image in (("<|image_1|> and", image) for image in pictures)
        ]
        whole = process(llm, {"prompt": prompt, "multi_modal_data": {"image": pictures}})
    own = [one.token_ids.count(644) for one in made]
    runs = [
        len(list(run))
        for is_picture, run in groupby(whole.token_ids, lambda token: token == 644)
        if is_picture
    ]
    assert runs == own
    assert len(set(own)) > 2, "else it would not show"


def test_options_are_checked_and_unknown_ones_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="did you mean 'num_crops'"):
        llm.generate(ask(PICTURES[0], mm_processor_kwargs={"num_crop": 4}), ONE_TOKEN)
    with pytest.raises(MediaError, match="image 1: num_crops=0"):
        llm.generate(ask(PICTURES[0], mm_processor_kwargs={"num_crops": 0}), ONE_TOKEN)
    with pytest.raises(RequestError, match="tokenize_whole_prompt=1: expected true or false"):
        llm.generate(ask(PICTURES[0], mm_processor_kwargs={"tokenize_whole_prompt": 1}), ONE_TOKEN)


def test_options_of_the_engine_hold_for_every_request() -> None:
    options = {"num_crops": 1, "tokenize_whole_prompt": True}
    with LLM(str(GOLDEN / "model"), kv_cache_memory=2**24, mm_processor_kwargs=options) as llm:
        [output] = llm.generate(ask(PICTURES[0]), ONE_TOKEN, use_tqdm=False)
        assert output.prompt_token_ids.count(644) == 313
        assert output.prompt_token_ids.count(1) == 1, "one BOS"


@pytest.mark.parametrize(
    ("embeds", "words"),
    [
        (torch.zeros(1, 313, 65), r"shape \(313, 65\); expected \(tokens, 64\)"),
        (torch.zeros(1, 312, 64), r"\(312, 64\); a picture of this family has"),
        (torch.full((1, 313, 64), float("nan")), "NaN"),
        (torch.zeros(1, 313, 64).to_sparse(), "dense"),
        (torch.zeros(1, 313, 64, dtype=torch.int64), "image"),
        ([torch.zeros(313, 64), torch.zeros(313, 65)], "placeholder"),
        ({"embeds": torch.zeros(1, 313, 64)}, "got a dict"),
    ],
    ids=["width", "rows", "NaN", "sparse", "integer", "two for one", "dict"],
)
def test_wrong_embeddings_are_refused(llm: LLM, embeds: Any, words: str) -> None:
    prompt = {"prompt": "<|image_1|> which?", "multi_modal_data": {"image": embeds}}
    with pytest.raises(RequestError, match=words):
        llm.generate(prompt, ONE_TOKEN, use_tqdm=False)


def test_embeddings_of_pictures_of_different_sizes(llm: LLM) -> None:
    prompt = ask(*PICTURES, mm_processor_kwargs={"num_crops": 6})
    processed = process(llm, prompt)
    with torch.inference_mode():
        model = loaded_model(llm)
        embeds = [model.encode("image", [item.mapped])[0].clone() for item in processed.media]
    assert len({len(part) for part in embeds}) == 2
    ready = {**prompt, "multi_modal_data": {"image": embeds}}
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    first, second = llm.generate([prompt, ready], params, use_tqdm=False)
    assert first.prompt_token_ids == second.prompt_token_ids
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_a_checkpoint_without_a_template_has_the_familys(llm: LLM, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "model", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = settings.pop("chat_template")
    assert own != CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    image = {"type": "image", "image": picture(PICTURES[0])}
    conversations: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": "Hello"}],
        [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}],
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "A cup."},
            {"role": "user", "content": [{"type": "text", "text": "And this?"}, image]},
        ],
    ]
    with LLM(str(folder), kv_cache_memory=2**24) as bare:
        for messages in conversations:
            expected = render(llm, messages)
            assert render(bare, messages) == expected
        assert "<|user|>\nAnd this?\n<|image_2|><|end|>\n<|assistant|>\n" in expected


def test_an_answer_ends_where_the_family_ends_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "model", folder)
    (folder / "generation_config.json").unlink()
    with LLM(str(folder), kv_cache_memory=2**24) as llm:
        names = ["<|end|>", "<|assistant|>", "<|endoftext|>"]
        assert llm.engine.frontend.eos_token_ids == {
            2,
            *map(llm.engine.frontend.tokenizer.convert_tokens_to_ids, names),
        }


def test_the_context_ends_where_the_sliding_window_would_begin(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "model", folder)
    (folder / "config.json").write_text(json.dumps({**recorded_config(), "sliding_window": 2047}))
    with LLM(str(folder), kv_cache_memory=2**24) as llm:
        assert llm.engine.resolved.max_model_len == 2047


def test_code_in_the_checkpoint_is_never_run(llm: LLM, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "model", folder)
    trap = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise RuntimeError('run')\n"
    names = ["configuration_phi3_v", "modeling_phi3_v", "processing_phi3_v", "image_processing_phi3_v"]
    for name in [*names, "__init__", "tokenization_phi3_v"]:
        (folder / f"{name}.py").write_text(trap)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_phi3_v.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    [expected] = llm.generate(ask(PICTURES[0]), ONE_TOKEN, use_tqdm=False)
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**24, trust_remote_code=True) as trusting:
        [output] = trusting.generate(ask(PICTURES[0]), ONE_TOKEN, use_tqdm=False)
    assert output.prompt_token_ids == expected.prompt_token_ids
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert not (tmp_path / "ran").exists()


def test_a_config_of_another_arrangement_is_a_checkpoint_error(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "model", folder)
    config = recorded_config()
    config["embd_layer"]["hd_transform_order"] = "glb_sub"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="glb_sub"):
        LLM(str(folder))
