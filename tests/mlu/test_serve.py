"""``opsin serve`` on the simulated card answers OpenAI's client, truthfully."""

from __future__ import annotations

import base64
import importlib
import io
import sys
from pathlib import Path
from types import ModuleType

import openai
import pytest
from PIL import Image

from opsin import LLM, SamplingParams
from tests.server.process import serve

ROOT = Path(__file__).parents[2]
MODEL = "opsin/tiny-qwen2vl"
KINDS = ("colour", "shape", "position", "count", "number", "compare")


@pytest.fixture(scope="module")
def scenes() -> ModuleType:
    """What draws the demonstration's pictures."""
    sys.path.insert(0, str(ROOT / "demo"))
    return importlib.import_module("scenes")


def data_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def test_answers_to_the_openai_client(scenes: ModuleType, tmp_path: Path) -> None:
    questions = [scenes.make_question(kind, scenes.FRESH_SEEDS[0] + 370) for kind in KINDS]
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image_url", "image_url": {"url": data_url(i)}} for i in question.images),
                    {"type": "text", "text": question.text},
                ],
            }
        ]
        for question in questions
    ]
    flags = ("--device", "mlu", "--dtype", "float16")
    launcher = ("-m", "tests.mlu_sim", "--memory", str(2**30))
    with serve(MODEL, *flags, log=tmp_path / "log", launcher=launcher) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answers = []
        for conversation in conversations:
            stream = client.chat.completions.create(
                model=MODEL,
                messages=conversation,  # type: ignore[arg-type]
                temperature=0,
                max_tokens=32,
                stream=True,
            )
            answers.append("".join(part.choices[0].delta.content or "" for part in stream if part.choices))
        assert "on mlu:0 in float16" in server.log.read_text()
        assert "reference: top_k\n" in server.log.read_text()
    with LLM(MODEL, device="cpu", dtype="float32", kv_cache_memory=2**24) as llm:
        params = SamplingParams(temperature=0, max_tokens=32)
        expected = [o.outputs[0].text for o in llm.chat(conversations, params, use_tqdm=False)]
    assert answers == expected, "the CPU's answers"
    right = sum(answer == question.answer for answer, question in zip(answers, questions))
    assert right >= len(questions) - 1, list(zip(answers, (question.answer for question in questions)))
