"""Weights, versions, towers and the whole model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from opsin import LLM, SamplingParams
from opsin.errors import CheckpointError, MediaError, RequestError
from opsin.testing.models import (
    RecordedCase,
    build_unloaded,
    encode,
    fill,
    loaded_model,
    process,
    recorded_cases,
    recorded_logits,
    render,
    weight_shapes,
)
from opsin_models_minicpmv.model import MiniCPMV
from opsin_models_minicpmv.resampler import positions_2d
from opsin_models_minicpmv.versions import default_chat_template, version_of
from opsin_models_minicpmv.vision import bucketised, position_rows

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
FAMILIES = ["minicpmv20", "minicpmv25", "minicpmv26"]
IMAGE = "(<image>./</image>)"


def cases(family: str) -> Sequence[RecordedCase]:
    return recorded_cases(GOLDEN / family, GOLDEN / "images")


def largest_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


picture = cases(FAMILIES[0])[0].picture

VISION = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "MiniCPM-V-2": {
        "slice_mode": True,
        "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
        "drop_vision_last_layer": True,
        "hidden_size": 2304,
        "intermediate_size": 5760,
        "num_hidden_layers": 40,
        "num_attention_heads": 36,
        "num_key_value_heads": 36,
        "vocab_size": 122753,
        "query_num": 64,
        "rms_norm_eps": 1e-5,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "tie_word_embeddings": False,
    },
    "MiniCPM-Llama3-V-2_5": {
        "version": "2.5",
        "vision_config": {**VISION, "model_type": "idefics2"},
        "drop_vision_last_layer": False,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "query_num": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
    },
    "MiniCPM-V-2_6": {
        "version": 2.6,
        "vision_config": {**VISION, "model_type": "siglip"},
        "drop_vision_last_layer": False,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 151666,
        "query_num": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
}


def config_of(family: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / family / "model" / "config.json").read_text())
    return config


def build(config: dict[str, Any]) -> MiniCPMV:
    """A model of this shape, without weights."""
    return build_unloaded(MiniCPMV, config)


# ---- weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_are_exactly_the_recorded_keys(family: str) -> None:
    model = build(config_of(family))
    slots = weight_shapes(model)
    keys = json.loads((GOLDEN / family / "weight_keys.json").read_text())
    assert sorted(str(model.weight_name(key)) for key in keys) == sorted(slots)
    with safe_open(GOLDEN / family / "model" / "model.safetensors", framework="pt") as file:
        for key in keys:
            assert tuple(file.get_slice(key).get_shape()) == slots[str(model.weight_name(key))]


def test_a_tied_head_is_not_waited_for() -> None:
    model = build({**config_of("minicpmv26"), "tie_word_embeddings": True})
    report = fill(model, [])
    assert "model.embed_tokens.weight" in report.missing
    assert "lm_head.weight" not in report.missing


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        # Tensors: a norm, attention and MLP of each decoder layer; embeddings, norm, head; the tower; the
        # resampler. Parameters as the model pages round them: 3.43B, 8.54B, 8.10B.
        ("MiniCPM-V-2", 40 * 9 + 3 + 26 * 12 + 5 + 14, 3.43e9),
        ("MiniCPM-Llama3-V-2_5", 32 * 9 + 3 + 27 * 16 + 5 + 13, 8.54e9),
        ("MiniCPM-V-2_6", 28 * 12 + 3 + 27 * 16 + 5 + 13, 8.10e9),
    ],
)
def test_published_shapes_build_without_memory(name: str, tensors: int, parameters: float) -> None:
    model = build(PUBLISHED[name])
    slots = weight_shapes(model)
    assert len(slots) == tensors
    total = sum(math.prod(shape) for shape in slots.values())
    assert abs(total - parameters) < 0.005e9
    assert not list(model.parameters())
    assert not list(model.buffers())
    query = PUBLISHED[name]["query_num"], PUBLISHED[name]["hidden_size"]
    assert slots["resampler.query"] == query
    positions = slots.get("vpm.pos_embed") or slots["vpm.tower.embeddings.position_embedding.weight"]
    assert positions == ((1, 27 * 27, 1152) if name == "MiniCPM-V-2" else (70 * 70, 1152))


# ---- versions ---------------------------------------------------------------------------------------


def test_the_version_is_read_from_the_config() -> None:
    assert [version_of(config_of(family)) for family in FAMILIES] == ["2.0", "2.5", "2.6"]
    for config in ({"version": 4.0}, {"version": "2.7", "slice_mode": True}, {}):
        with pytest.raises(ValueError, match=r"2\.5 and 2\.6"):
            version_of(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 4.5}, "not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor of rope_scaling"),
        ({"query_num": None}, "query_num is None; expected an integer"),
        ({"hidden_size": 192}, "multiple of 128"),
        ({"vision_config": {"model_type": "vit"}}, "vision_config.model_type is 'vit'"),
        ({"vision_config": None}, "kv_proj"),  # the published tower, which is wider
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(tmp_path: Path, changes: Any, words: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "minicpmv26" / "model", folder)
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps({**config_of("minicpmv26"), **changes}))
    with pytest.raises(CheckpointError, match=words):
        LLM(str(folder), kv_cache_memory=2**20)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("minicpmv20", f"<用户>{IMAGE}\nWhat is it?<AI>A cat.<用户>Is it small?<AI>"),
        (
            "minicpmv25",
            f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{IMAGE}\nWhat is it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nIs it small?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "minicpmv26",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{IMAGE}\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
            "<|im_start|>user\nIs it small?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_chats_without_a_template_of_the_checkpoints(family: str, expected: str) -> None:
    cat = picture("cat_150x240.png")
    question: list[dict[str, Any]] = [
        {"type": "image", "image": cat},
        {"type": "text", "text": "What is it?"},
    ]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Is it small?"},
    ]
    template = default_chat_template(config_of(family))
    with load(family, chat_template=template) as llm:
        assert render(llm, messages) == expected
        if family == "minicpmv20":  # the one whose checkpoint has none
            case = next(case for case in cases(family) if case.name == "multi_turn")
            assert case.data["prompt"] == expected
        else:
            own = load(family)
            assert render(own, messages) == expected
            own.close()


def load(family: str, **settings: Any) -> LLM:
    # The recorded checkpoints name Python code of their hub repositories; accepting it runs none.
    settings = {"dtype": "float32", "kv_cache_memory": 2**22, "trust_remote_code": True, **settings}
    return LLM(str(GOLDEN / family / "model"), **settings)


@pytest.mark.parametrize(
    ("family", "stops"),
    [
        ("minicpmv20", ["</s>"]),
        ("minicpmv25", ["<|end_of_text|>", "<|eot_id|>"]),
        ("minicpmv26", ["<|endoftext|>", "<|im_end|>"]),
    ],
)
def test_an_answer_ends_with_the_turn(family: str, stops: list[str]) -> None:
    with load(family) as llm:
        ids = {llm.engine.frontend.tokenizer.convert_tokens_to_ids(text) for text in stops}
        assert llm.engine.frontend.eos_token_ids == ids


# ---- towers and resampler -------------------------------------------------------------------------


def test_positions_are_fractions_of_the_table() -> None:
    # Boundaries apart, patch i of n stands in row floor(i / n * side).
    for count, side in [(5, 20), (13, 70), (70, 70), (97, 70), (192, 70)]:
        rows = bucketised(count, side)
        assert len(rows) == count
        off = rows - torch.arange(count) * side // count
        assert set(off.tolist()) <= {0, -1, 1}
        inside = (torch.arange(count) * side % count) != 0
        assert not bool(off[inside].any())


def test_positions_in_two_dimensions_and_along_one_line() -> None:
    square = position_rows((2, 4), 20, flat=False)
    assert square.tolist() == [0, 5, 10, 15, 200, 205, 210, 215]
    line = position_rows((2, 4), 20, flat=True)
    assert line.tolist() == bucketised(8, 20).tolist()
    assert int(line.max()) < 20


def test_resampler_positions_are_sines_and_cosines_of_column_and_row() -> None:
    width = 16
    [first, second] = positions_2d([(2, 3), (80, 1)], width).split([6, 80])
    frequencies = 10000.0 ** -(torch.arange(4) / 4)
    for index, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        parts = [torch.sin(column * frequencies), torch.cos(column * frequencies)]
        parts += [torch.sin(row * frequencies), torch.cos(row * frequencies)]
        torch.testing.assert_close(first[index], torch.cat(parts))
    # A slice higher than the published cache of 70 x 70 has positions too.
    torch.testing.assert_close(second[79, 8:12], torch.sin(79 * frequencies), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_do_not_depend_on_their_company(family: str) -> None:
    names = ["coffee_320x213.png", "cat_150x240.png", "rocket_400x80.png", "astronaut_96x96.png"]
    with load(family) as llm, torch.inference_mode():
        prompt = {"prompt": IMAGE * 4, "multi_modal_data": {"image": [picture(name) for name in names]}}
        items = [placed.mapped for placed in process(llm, prompt).media]
        model = loaded_model(llm)
        together = model.encode("image", items)
        for item, embeds in zip(items, together, strict=True):
            assert embeds.shape == (item.num_embeds, model.hidden_size)
            torch.testing.assert_close(embeds, model.encode("image", [item])[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_slices_of_a_step_pass_the_tower_at_once(family: str) -> None:
    names = ["coffee_320x213.png", "cat_150x240.png", "rocket_400x80.png"]
    prompts = [
        {"prompt": f"{IMAGE} what?", "multi_modal_data": {"image": picture(name)}}
        for name in [*names, names[0]]
    ]
    with load(family) as llm:
        model = loaded_model(llm)
        assert isinstance(model, nn.Module)
        seen: list[int] = []
        model.vpm.register_forward_hook(lambda module, args, output: seen.append(len(args[1])))
        for number, prompt in enumerate(prompts):
            processed = process(llm, prompt)
            llm.engine.add(str(number), processed, SamplingParams(temperature=0, max_tokens=2))
        while llm.engine.has_unfinished():
            llm.engine.step()
        assert seen == [7 + 3 + 5], "slices of three pictures, the repeated one encoded once"
        assert llm.engine.stats().num_encoded == 3


# ---- the whole model --------------------------------------------------------------------------------


def test_frames_as_a_video_are_the_recorded_frames_as_images() -> None:
    case = next(case for case in cases("minicpmv26") if case.name == "video_frames")
    frames = case.media()["image"]
    prompt = {
        "prompt": case.data["prompt"].replace("\n".join([IMAGE] * len(frames)), "(<video>./</video>)"),
        "multi_modal_data": {"video": frames},
    }
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with load("minicpmv26") as llm:
        with recorded_logits(llm) as logits:
            [output] = llm.generate(prompt, params, use_tqdm=False)
        assert output.prompt_token_ids == case.data["prompt_token_ids"]
        assert output.outputs[0].token_ids == case.data["greedy_token_ids"]
        assert largest_difference(torch.cat(logits), case.tensors["step_logits"]) < 1e-4
        content = [
            {"type": "video", "video": frames},
            {"type": "text", "text": "What is shown in the video?"},
        ]
        [chatted] = llm.chat([{"role": "user", "content": content}], params, use_tqdm=False)
        assert chatted.prompt_token_ids == output.prompt_token_ids
        # The same as embeddings, made here.
        [placed] = process(llm, prompt).media
        [made] = encode(llm, "video", [placed.mapped])
        ready = {"video_embeds": made.clone().unflatten(0, (-1, 16)), "video_image_sizes": [(112, 84)] * 4}
        embedded = {**prompt, "multi_modal_data": {"video": ready}}
        [again] = llm.generate(embedded, params, use_tqdm=False)
        assert again.prompt_token_ids == output.prompt_token_ids
        assert again.outputs[0].token_ids == output.outputs[0].token_ids


@pytest.mark.parametrize("family", ["minicpmv20", "minicpmv25"])
def test_a_video_is_refused_where_none_are_taken(family: str) -> None:
    frames = [picture("video_0_112x84.png")] * 2
    with load(family) as llm, pytest.raises(RequestError, match="video"):
        llm.generate({"prompt": "(<video>./</video>)", "multi_modal_data": {"video": frames}}, use_tqdm=False)


def test_embeddings_as_dicts_for_each_image() -> None:
    case = next(case for case in cases("minicpmv26") if case.name == "multi_image")
    parts = case.tensors["image_embeds"].split([7, 3])
    sizes = case.data["image_sizes"]
    given = [{"image_embeds": part, "image_size_list": [tuple(size)]} for part, size in zip(parts, sizes)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with load("minicpmv26") as llm:
        prompt = {"prompt": case.data["prompt"], "multi_modal_data": {"image": given}}
        with recorded_logits(llm) as logits:
            [output] = llm.generate(prompt, params, use_tqdm=False)
        assert output.prompt_token_ids == case.data["prompt_token_ids"]
        assert largest_difference(torch.cat(logits), case.tensors["step_logits"]) < 1e-4
        assert llm.engine.stats().num_encoded == 0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda embeds: embeds[..., :-1], "expected"),
        (lambda embeds: embeds[:-1], "slices"),
        (lambda embeds: embeds.index_fill(0, torch.tensor([1]), float("nan")), "NaN"),
        (lambda embeds: embeds.long(), "floating"),
        (lambda embeds: embeds.to_sparse(), "dense"),
    ],
    ids=["hidden", "count", "nan", "integer", "sparse"],
)
def test_wrong_embeddings_fail_alone(spoil: Any, words: str) -> None:
    case = next(case for case in cases("minicpmv26") if case.name == "single_sliced")
    good = {"image_embeds": case.tensors["image_embeds"], "image_sizes": [(320, 213)]}
    wrong = {**good, "image_embeds": spoil(good["image_embeds"])}
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with load("minicpmv26") as llm:
        prompts = [
            {"prompt": case.data["prompt"], "multi_modal_data": {"image": data}}
            for data in (good, wrong, good)
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False, on_error="return")
    assert isinstance(outputs[1].error, MediaError)
    assert words in str(outputs[1].error)
    for output in (outputs[0], outputs[2]):
        assert output.outputs[0].token_ids == case.data["greedy_token_ids"][:4]
