"""The family through `LLM`: chat templates, ready-made embeddings, encoder calls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opsin import LLM, SamplingParams
from opsin.errors import CheckpointError, ConfigError, RequestError
from opsin.testing.models import loaded_model, recorded_logits, render_template
from opsin_models_llava.model import Llava
from opsin_models_llava.plugin import MISTRAL_TEMPLATE, VICUNA_TEMPLATE, chat_template

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
FAMILIES = ["llava15", "llava_next"]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def load(folder: Path, **settings: Any) -> LLM:
    return LLM(str(folder), dtype="float32", kv_cache_memory=2**23, **settings)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def llm(family: str) -> Iterator[LLM]:
    with load(GOLDEN / family / "model") as loaded:
        yield loaded


def picture(name: str) -> Image.Image:
    return Image.open(GOLDEN / "images" / name)


def recorded(family: str, case: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = GOLDEN / family / "cases" / case
    return json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")


def features(family: str, case: str) -> list[torch.Tensor]:
    """The recorded embeddings of each picture of a case."""
    data, tensors = recorded(family, case)
    if "image_embeds" in tensors:
        return list(tensors["image_embeds"])
    return list(tensors["image_embeds_packed"].split(data["num_image_tokens"]))


# --------------------------------------------------------------------------------------------------
# Chat templates
# --------------------------------------------------------------------------------------------------

IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What is it?"}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": [TEXT]}],
    [{"role": "user", "content": [IMAGE, TEXT]}],
    [{"role": "user", "content": [IMAGE, TEXT, IMAGE]}],
    [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [IMAGE, TEXT]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
        {"role": "user", "content": [{"type": "text", "text": "Which?"}]},
    ],
]


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("family", FAMILIES)
def test_default_templates_are_the_hubs(family: str, number: int) -> None:
    folder = GOLDEN / family / "model"
    hub = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    own = chat_template(json.loads((folder / "config.json").read_text()))
    assert own is not None
    rendered = [render_template(source, folder, CONVERSATIONS[number]) for source in (own, hub)]
    assert rendered[0] == rendered[1]
    assert "What is it?" in rendered[0]
    assert ("{% generation %}" in hub) == (family == "llava15"), "the tag must be rendered somewhere"


def test_default_templates_by_text_model() -> None:
    mistral, llama = {"model_type": "mistral"}, {"model_type": "llama"}
    next_, plain = ["LlavaNextForConditionalGeneration"], ["LlavaForConditionalGeneration"]
    assert chat_template({"architectures": next_, "text_config": mistral}) == MISTRAL_TEMPLATE
    assert chat_template({"architectures": next_, "text_config": llama}) == VICUNA_TEMPLATE
    assert chat_template({"architectures": plain, "text_config": mistral}) == VICUNA_TEMPLATE
    assert chat_template({"architectures": plain}) == VICUNA_TEMPLATE
    assert chat_template({"architectures": plain, "text_config": {"model_type": "qwen2"}}) is None


def test_chat_without_a_template_of_its_own(llm: LLM, family: str, tmp_path: Path) -> None:
    for file in (GOLDEN / family / "model").iterdir():
        if file.name != "chat_template.json":
            shutil.copy(file, tmp_path)
    data, _ = recorded(family, "multi_image_chat")
    parts = [
        {"type": "image", "image": picture(data["images"].pop(0))} if part["type"] == "image" else part
        for part in data["messages"][0]["content"]
    ]
    with load(tmp_path) as bare:
        assert bare.engine.checkpoint.chat_template is None
        [output] = bare.chat([{"role": "user", "content": parts}], GREEDY, use_tqdm=False)
        [text] = bare.chat([{"role": "user", "content": "What is in the image?"}], GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == data["prompt_token_ids"]
    assert text.prompt_token_ids == recorded(family, "text_only")[0]["prompt_token_ids"]


# --------------------------------------------------------------------------------------------------
# Ready-made embeddings
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "form"),
    [
        ("multi_image_chat", "list of (E, H)"),
        ("multi_image_chat", "list of (1, E, H)"),
        ("single", "(1, E, H)"),
        ("single", "(E, H)"),
    ],
)
def test_recorded_embeddings_give_the_recorded_logits(llm: LLM, family: str, case: str, form: str) -> None:
    if case == "single":
        case = "single_image" if family == "llava15" else "single_wide"
    embeds = features(family, case)
    given: Any = {
        "list of (E, H)": embeds,
        "list of (1, E, H)": [part[None] for part in embeds],
        "(1, E, H)": embeds[0][None],
        "(E, H)": embeds[0],
    }[form]
    data, tensors = recorded(family, case)
    with recorded_logits(llm) as logits:
        [output] = llm.generate(
            {"prompt": data["prompt"], "multi_modal_data": {"image": given}}, GREEDY, use_tqdm=False
        )
    assert output.prompt_token_ids == data["prompt_token_ids"]
    assert output.outputs[0].token_ids == data["greedy_token_ids"]
    assert float((torch.cat(logits) - tensors["step_logits"]).abs().max()) < 1e-4


def test_pictures_and_embeddings_in_one_prompt(llm: LLM, family: str) -> None:
    data, _ = recorded(family, "multi_image_chat")
    first, second = features(family, "multi_image_chat")
    pictures = [picture(name) for name in data["images"]]
    for images in ([first, pictures[1]], [pictures[0], second]):
        prompt = {"prompt": data["prompt"], "multi_modal_data": {"image": images}}
        [output] = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert output.prompt_token_ids == data["prompt_token_ids"]
        assert output.outputs[0].token_ids == data["greedy_token_ids"]


def bad_embeddings(good: torch.Tensor) -> dict[str, tuple[Any, str]]:
    """What is wrong -> (embeddings, a word of the message)."""
    with_nan = good.clone()
    with_nan[3, 4] = float("nan")
    return {
        "hidden size": (good[:, :-1], r"hidden|shape"),
        "count": ([good, good], "placeholder"),
        "NaN": (with_nan, "NaN"),
        "infinity": (good / 0, "NaN or infinity"),
        "sparse": (good.to_sparse(), "dense"),
        "integers": (good[None].to(torch.int64), "int64"),
        "a vector": (good[0], "shape"),
        "no rows": (good[None, :0], "shape"),
        "a dict": ({"embeds": good}, "dict"),
    }


@pytest.mark.parametrize("what", sorted(bad_embeddings(torch.ones(36, 64))))
def test_unusable_embeddings_fail_their_request_alone(llm: LLM, family: str, what: str) -> None:
    good = features(family, "single_image" if family == "llava15" else "single_wide")[0]
    value, words = bad_embeddings(good)[what]
    prompts = [
        {"prompt": "<image>\nWhat?", "multi_modal_data": {"image": image}} for image in (good, value, good)
    ]
    before, failed, after = llm.generate(prompts, GREEDY, use_tqdm=False, on_error="return")
    assert before.outputs[0].token_ids == after.outputs[0].token_ids
    assert isinstance(failed.error, RequestError)
    with pytest.raises(RequestError, match=words):
        llm.generate(prompts[1], GREEDY, use_tqdm=False)


# --------------------------------------------------------------------------------------------------
# Limits, options, encoder
# --------------------------------------------------------------------------------------------------


def test_unknown_settings_are_refused(family: str, llm: LLM) -> None:
    prompt = {"prompt": "<image>", "multi_modal_data": {"image": picture("cat_150x240.png")}}
    with pytest.raises(RequestError, match="num_crops"):
        llm.generate({**prompt, "mm_processor_kwargs": {"num_crops": 4}}, GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match="video"):
        llm.generate({"prompt": "a", "multi_modal_data": {"video": []}}, GREEDY, use_tqdm=False)
    with pytest.raises(ConfigError, match="video"):
        load(GOLDEN / family / "model", limit_mm_per_prompt={"video": 1})


def test_placeholders_without_pictures_are_refused(llm: LLM) -> None:
    for prompt in ({"prompt": "<image> what?"}, {"prompt_token_ids": [1, 600, 13]}):
        with pytest.raises(RequestError, match="placeholder"):
            llm.generate(prompt, GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match="placeholder"):
        llm.generate(
            {"prompt": "what?", "multi_modal_data": {"image": picture("cat_150x240.png")}},
            GREEDY,
            use_tqdm=False,
        )


def test_pictures_of_one_step_are_encoded_in_one_pass(family: str) -> None:
    names = ["coffee_320x213.png", "cat_150x240.png", "rocket_400x80.png"]
    prompts = [
        {"prompt": "<image> one", "multi_modal_data": {"image": picture(names[0])}},
        {"prompt": "<image> and <image>", "multi_modal_data": {"image": [picture(n) for n in names[1:]]}},
    ]
    with load(GOLDEN / family / "model") as fresh:
        model = loaded_model(fresh)
        assert isinstance(model, Llava)
        tower, passes = model.vision_tower, []
        handle = tower.register_forward_hook(lambda module, args, output: passes.append(len(args[1])))
        fresh.generate(prompts, GREEDY, use_tqdm=False)
        handle.remove()
        assert fresh.engine.stats().num_encoded == 3
    assert len(passes) == 1, "the three pictures of two requests"
    assert passes[0] == (3 if family == "llava15" else 5 + 5 + 4), "squares"


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 97)])
def test_extreme_shapes_are_answered(llm: LLM, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    prompt = {"prompt": "<image> what?", "multi_modal_data": {"image": pixels}}
    [output] = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 16


def test_a_processor_of_another_size_is_reported(family: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / family / "model", tmp_path, dirs_exist_ok=True)
    settings = tmp_path / "preprocessor_config.json"
    settings.chmod(0o644)
    changed = {**json.loads(settings.read_text()), "crop_size": {"height": 98, "width": 98}}
    settings.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="98x98"):
        load(tmp_path)
