"""The code of the device guide: a device of one file answers, and a kernel of its own is used."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from opsin import LLM, SamplingParams
from opsin.kernels import rms_norm
from opsin.plugins import load_plugins

PAGE = (Path(__file__).parents[2] / "docs" / "write-a-device-plugin.md").read_text()
DEVICE, KERNELS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
CHAT = [
    {
        "role": "user",
        "content": [
            {"type": "image_pil", "image_pil": Image.new("RGB", (56, 56), "red")},
            {"type": "text", "text": "What colour is the picture?"},
        ],
    }
]


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The imaginary chip's packages; its tensors live on the CPU."""
    kernels = ModuleType("mychip_kernels")
    kernels.__dict__["rms_norm"] = rms_norm
    monkeypatch.setitem(sys.modules, "mychip_kernels", kernels)
    monkeypatch.setitem(sys.modules, "torch_mychip", ModuleType("torch_mychip"))
    memory = SimpleNamespace(mem_get_info=lambda index: (2**28, 2**30))
    monkeypatch.setattr(torch, "mychip", memory, raising=False)


def plugin(code: str) -> Any:
    """The page's code as a plugin; only the torch device is another."""
    namespace: dict[str, Any] = {}
    exec(compile(code.replace('f"mychip:{index}"', '"cpu"'), "write-a-device-plugin.md", "exec"), namespace)
    return SimpleNamespace(**{name: item for name, item in namespace.items() if name.startswith("opsin_")})


def answers(code: str) -> tuple[str, Mapping[str, Any]]:
    with LLM(
        "opsin/tiny-qwen2vl", device="mychip", plugins=load_plugins(extra={"mychip": plugin(code)})
    ) as llm:
        [output] = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        providers = {choice.op: choice.provider for choice in llm.engine.executor.kernels.choices}
        return output.outputs[0].text, providers


@pytest.mark.usefixtures("chip")
def test_one_file_is_a_device() -> None:
    text, providers = answers(DEVICE)
    assert text
    assert set(providers.values()) == {"reference"}


@pytest.mark.usefixtures("chip")
def test_its_own_kernel_is_used() -> None:
    text, providers = answers(DEVICE + KERNELS)
    assert text
    assert providers["rms_norm"] == "mychip"
    assert providers["rotary"] == "reference"


def test_without_its_driver_the_probe_says_what_to_do() -> None:
    [spec] = plugin(DEVICE).opsin_register_devices()
    probe = spec.probe()
    assert probe.score == 0
    assert "torch_mychip" in probe.reason
    assert probe.next_step == "install the driver"
