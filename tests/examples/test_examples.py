"""The scripts of examples/ run as their texts say, on the tiny models that need no download."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opsin.checkpoint.tokenizer import load_tokenizer
from opsin.inputs.template import ChatTemplate
from tests.server.process import GOLDEN, ServerProcess, serve

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from offline_inference_vision_language import FAMILIES

EXAMPLES = Path(__file__).parents[2] / "examples"
ONE_PICTURE = {"llava"}
"""Families whose tiny checkpoint was trained on one picture at a time."""


def run(script: str, *arguments: str) -> list[str]:
    """The lines that a script prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# --- offline --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_offline(family: str) -> None:
    lines = run("offline_inference_vision_language.py", "--model-type", family, "--max-tokens", "4")
    answers = [line for line in lines if "  ->  " in line]
    assert len(answers) == 3
    assert len(set(answers)) == 1
    if FAMILIES[family].trained:
        assert answers[0] == "What colour is the circle?  ->  'red'"
    else:
        assert "random weights" in lines[0]


def test_names_of_families_are_also_written_with_hyphens() -> None:
    lines = run("offline_inference_vision_language.py", "--model-type", "qwen2-vl", "--num-prompts", "1")
    assert lines[-1] == "What colour is the circle?  ->  'red'"


def test_offline_video() -> None:
    lines = run("offline_inference_vision_language.py", "--modality", "video", "--num-prompts", "1")
    assert lines[-1] == "Which way does the circle move?  ->  'right'"


def test_offline_with_a_picture_and_model_of_ones_own(tmp_path: Path) -> None:
    arguments = ["--model", str(GOLDEN / "qwen2vl" / "model"), "--question", "What?", "--max-tokens", "2"]
    lines = run(
        "offline_inference_vision_language.py",
        *arguments,
        *("--image", str(GOLDEN / "images" / "cat_150x240.png")),
    )
    assert len([line for line in lines if line.startswith("What?  ->  ")]) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_offline_multi_image(family: str) -> None:
    script = "offline_inference_vision_language_multi_image.py"
    if FAMILIES[family].trained and family not in ONE_PICTURE:
        lines = run(script, "--model-type", family)
        assert lines[-1] == "Which picture has more circles?  ->  'the first'"
    generated, chatted = (
        run(script, "--model-type", family, "--method", method, "--max-tokens", "4")[-1]
        for method in ("generate", "chat")
    )
    assert "  ->  " in generated
    if family == "qwen2_vl":
        assert generated == chatted, "the placeholders stand where the chat template puts them"


@pytest.mark.parametrize("script", ["", "_multi_image"])
@pytest.mark.parametrize(
    "model", [str(GOLDEN / name / "model") for name in ("qwen25vl", "smolvlm", "phi3v", "llava15")]
)
def test_the_checkpoint_says_its_family(script: str, model: str) -> None:
    """Of families whose prompt the script knows, and of others through their chat template."""
    arguments = ("--model", model, "--max-tokens", "3")
    assert "  ->  " in run(f"offline_inference_vision_language{script}.py", *arguments)[-1]


def test_structured_output() -> None:
    assert run("structured_output.py") == ["one of several: blue", "a number: 3", "JSON: 3"]


def test_search_by_words(tmp_path: Path) -> None:
    """What is found is what was looked for; the index is made once, and later pictures are added."""
    folder = tmp_path / "pictures"
    arguments = ("--folder", str(folder), "--top", "3")
    queries = ("A red circle.", "A blue square.", "A yellow triangle.")
    lines = run("embedding_search.py", *queries, *arguments)
    found = [re.findall(r"\d-(\w+)-(\w+)\.png", line) for line in lines]
    assert len(list(folder.glob("*.png"))) == 200
    for place, query in enumerate(queries):
        colour, shape = query.strip("A.").split()
        assert found[4 * place + 1 : 4 * place + 4] == [[(colour, shape)]] * 3
    before = (folder / "index.npz").stat().st_mtime_ns
    run("embedding_search.py", *queries, *arguments)
    assert (folder / "index.npz").stat().st_mtime_ns == before
    for path in list(folder.glob("*red-circle.png"))[1:]:
        path.unlink()
    next(folder.glob("*red-circle.png")).rename(folder / "new.png")
    assert "new.png" in run("embedding_search.py", queries[0], "--folder", str(folder), "--top", "1")[1]


# --- templates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "family", "case"),
    [
        ("template_vlm2vec.jinja", "phi3v", "embed_image"),
        ("template_vlm2vec.jinja", "phi3v", "embed_text"),
        ("template_dse_qwen2_vl.jinja", "qwen2vl", "embed_dse_document"),
        ("template_dse_qwen2_vl.jinja", "qwen2vl", "embed_dse_query"),
    ],
)
def test_templates_give_the_recorded_prompts(template: str, family: str, case: str) -> None:
    recorded = json.loads((GOLDEN / family / "cases" / case / "case.json").read_text())
    text = re.split(r"<\|vision_end\|>|<\|image_1\|> ", recorded["prompt"])[-1].split("<|im_end|>")[0]
    content = [{"type": "image"}] * len(recorded["images"]) + [{"type": "text", "text": text}]
    rendered = rendering(template, family)
    assert rendered([{"role": "user", "content": content}]) == recorded["prompt"]
    if not recorded["images"]:
        assert rendered([{"role": "user", "content": text}]) == recorded["prompt"]


def rendering(template: str, family: str) -> Any:
    """Messages -> prompt, by a template of the examples."""
    tokenizer: Any = load_tokenizer(GOLDEN / family / "model")
    chat = ChatTemplate((EXAMPLES / template).read_text(), tokenizer)
    assert chat.format == "openai"
    return lambda messages: chat.render(
        messages, add_generation_prompt=True, continue_final_message=False, tools=None, variables={}
    )


def test_vlm2vec_numbers_pictures_and_takes_one_message() -> None:
    from opsin.errors import RequestError

    rendered = rendering("template_vlm2vec.jinja", "phi3v")
    parts = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    message = {"role": "user", "content": parts}
    assert rendered([message]) == "<|image_1|> and <|image_2|>"
    with pytest.raises(RequestError, match="one message at a time"):
        rendered([message, message])


# --- clients --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    flags = ("--allow-loopback-media", "--files-dir", str(folder / "jobs"))
    with serve("opsin/tiny-qwen2vl", *flags, log=folder / "log") as running:
        yield running


def test_tools_are_called_in_the_right_form(chat_server: ServerProcess) -> None:
    script = "openai_chat_completion_client_with_tools.py"
    lines = run(script, "--base-url", f"{chat_server.url}/v1", "--max-tokens", "4")
    calls = [line for line in lines if line.startswith("count_stock(")]
    assert len(calls) == 4
    assert all(re.search(r'"in_stock": \d+}$', call) for call in calls)


def test_batches(chat_server: ServerProcess) -> None:
    lines = run("openai_batch_client.py", "--base-url", f"{chat_server.url}/v1", "--pictures", "7")
    colours = ("red", "green", "blue", "yellow", "purple", "red", "green")
    assert lines[-7:] == [f"picture-{number} {colour}" for number, colour in enumerate(colours)]


def test_an_error_names_the_flag_that_is_missing(tmp_path: Path) -> None:
    script = str(EXAMPLES / "openai_chat_completion_client_for_multimodal.py")
    with serve("opsin/tiny-qwen2vl", log=tmp_path / "log") as server:
        command = [sys.executable, script, "--base-url", f"{server.url}/v1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "--allow-loopback-media" in done.stderr


def test_chat_client(chat_server: ServerProcess) -> None:
    lines = run("openai_chat_completion_client_for_multimodal.py", "--base-url", f"{chat_server.url}/v1")
    answers = [line.removeprefix("  -> ") for line in lines if line.startswith("  -> ")]
    assert len(answers) == 7
    assert answers[0] == "I am a tiny model that looks at pictures of shapes."
    assert answers[1:4] == ["red", "red", "the first"]
    assert answers[5:] == ["right", "right"]
    [only] = run(
        "openai_chat_completion_client_for_multimodal.py",
        *("--base-url", f"{chat_server.url}/v1", "--chat-type", "text-only"),
    )[2:]
    assert only == f"  -> {answers[0]}"


@pytest.mark.parametrize(
    ("model", "family", "template"),
    [("vlm2vec", "phi3v", "template_vlm2vec"), ("dse_qwen2_vl", "qwen2vl", "template_dse_qwen2_vl")],
)
def test_embedding_client(model: str, family: str, template: str, tmp_path: Path) -> None:
    flags = ("--task", "embedding", "--trust-remote-code", "--max-model-len", "2048")
    template_flag = ("--chat-template", str(EXAMPLES / f"{template}.jinja"))
    with serve(str(GOLDEN / family / "model"), *flags, *template_flag, log=tmp_path / "log") as running:
        lines = run(
            "openai_chat_embedding_client_for_multimodal.py",
            *("--model", model, "--base-url", f"{running.url}/v1"),
        )
    assert [line.split(" -> ")[1] for line in lines[:3]] == ["64 numbers"] * 3
    similarities = [float(line.split("similarity ")[1]) for line in lines[3:]]
    assert len(similarities) == 2
    assert all(-1.001 <= value <= 1.001 for value in similarities)
    assert similarities[0] != similarities[1]
