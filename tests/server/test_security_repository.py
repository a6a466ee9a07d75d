"""A model repository is data: nothing that it brings is imported, unpickled, or run by its templates."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opsin import LLM, SamplingParams
from opsin.errors import CheckpointError, RequestError
from opsin.inputs.chat import ChatOptions
from opsin.inputs.prompt import Prompt
from tests.server.in_thread import golden_config, running
from tests.server.messages import CAT, data_url, image, text, user
from tests.server.process import GOLDEN


def rendered(llm: LLM, messages: Any) -> Prompt:
    frontend = llm.engine.frontend
    return frontend.renderer.render(frontend.conversation(messages), ChatOptions())


EVIL = """
from pathlib import Path
Path({marker!r}).write_text("was run")
class Evil:
    def __init__(self, *args, **kwargs):
        Path({marker!r}).write_text("was run")
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()
register_for_auto_class = Evil
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that code of the repository would write."""
    return tmp_path / "was-run"


@pytest.fixture
def repository(tmp_path: Path, marker: Path) -> Path:
    """A working checkpoint, every way of it to bring code pointing at files that would leave the marker."""
    folder = tmp_path / "evil_model"
    shutil.copytree(GOLDEN / "qwen2vl" / "model", folder)
    code = EVIL.format(marker=str(marker))
    for name in ("evil", "modeling_qwen2_vl", "configuration_qwen2_vl", "__init__", "setup", "conftest"):
        (folder / f"{name}.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    auto = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor")
    auto += ("AutoModelForVision2Seq", "AutoModelForImageTextToText", "AutoFeatureExtractor")
    auto_map: dict[str, Any] = dict.fromkeys(auto, "evil.Evil")
    auto_map["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    for name in (
        "config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        path = folder / name
        settings = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**settings, "auto_map": auto_map, "trust_remote_code": True}))
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": auto_map}))
    return folder


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_nothing_of_it_is_imported(repository: Path, marker: Path, trust_remote_code: bool) -> None:
    before = set(sys.modules)
    with LLM(str(repository), trust_remote_code=trust_remote_code, kv_cache_memory=2**22) as llm:
        prompt = "<|vision_start|><|image_pad|><|vision_end|>Hello"
        picture = Image.open(GOLDEN / "images" / "astronaut_96x96.png")
        [output] = llm.generate(
            {"prompt": prompt, "multi_modal_data": {"image": picture}},
            SamplingParams(max_tokens=2, ignore_eos=True),
            use_tqdm=False,
        )
    assert len(output.outputs[0].token_ids) == 2
    assert not marker.exists()
    assert not [
        name for name in set(sys.modules) - before if "evil" in name or "transformers_modules" in name
    ]
    assert str(repository) not in sys.path


def test_a_server_imports_nothing_of_it(repository: Path, marker: Path) -> None:
    config = golden_config(model=str(repository), trust_remote_code=True)
    with running(config) as server:
        messages = user(image(data_url(CAT)), text("?"))
        answer = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 2})
        assert answer.status_code == 200, answer.text
    assert not marker.exists()


SOURCES = [path for place in ("core/src", "plugins") for path in (GOLDEN.parents[1] / place).rglob("*.py")]


TALKS = GOLDEN.parents[1] / "core/src/opsin/rank/worker.py"
"""An engine and the ranks it started talk over pipes that only they have inherited. What it writes is made of
its own objects; that bytes from elsewhere are read is what the test below rules out."""


def test_nothing_is_ever_unpickled() -> None:
    """Neither weights nor what clients send."""
    assert len(SOURCES) > 100
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                if path == TALKS:
                    assert "pickle.load" not in path.read_text()
                    continue
                assert not modules & {alias.name.partition(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in modules, path
            elif isinstance(node, ast.Attribute) and node.attr == "load":
                assert ast.unparse(node) not in ("torch.load", "np.load", "numpy.load"), path
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", path


class _Evil:
    """A pickle that would leave the marker."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return (Path.write_text, (self._marker, "was run"))


def test_pickled_weights_are_not_read(repository: Path, marker: Path) -> None:
    for file in repository.glob("*.safetensors"):
        file.unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (repository / name).write_bytes(pickle.dumps(_Evil(marker)))
    with pytest.raises(CheckpointError, match="a format that can run code"):
        LLM(str(repository))
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for m in messages %}{{ m.__class__.__base__ }}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ messages.append(messages) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_its_chat_template_is_rendered_in_a_sandbox(repository: Path, marker: Path, template: str) -> None:
    path = repository / "chat_template.json"
    path.write_text(json.dumps({"chat_template": template.replace("MARKER", str(marker))}))
    with LLM(str(repository), kv_cache_memory=2**22) as llm:
        messages = [{"role": "user", "content": "Hello"}]
        with pytest.raises(RequestError, match="the chat template refused these messages"):
            rendered(llm, messages)
    assert not marker.exists()
