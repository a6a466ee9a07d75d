"""Installing with pip into fresh environments: the packages of this repository, and somebody else's plugins.

A fresh environment sees the dependencies installed here (torch is not installed again, nothing is
downloaded) and nothing of opsin: what is there of it has been installed by the test, from its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "core"
CPU = ROOT / "plugins/device_cpu"
THIRD_PARTY = ROOT / "tests/thirdparty"
KNOWN = json.loads((CORE / "src/opsin/data/known_packages.json").read_text())
CHECKPOINT, ITS_PACKAGES = next(iter(KNOWN["checkpoints"].items()))
ARCHITECTURE = ITS_PACKAGES["architecture"]
MODEL_PACKAGE = KNOWN["architectures"][ARCHITECTURE]


@dataclass(frozen=True)
class Environment:
    """A virtual environment in which opsin was installed with pip."""

    folder: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, without settings from outside."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("OPSIN_", "PYTHON"))
        }
        program = str(self.folder / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            env={**kept, "HF_HUB_OFFLINE": "1"},
            cwd=self.folder,
            check=False,
        )

    def opsin(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("opsin", *arguments)

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        return self.run("python", "-c", code)

    def report(self, *arguments: str) -> dict[str, Any]:
        """A command's JSON."""
        result = self.opsin(*arguments, "--json")
        assert result.stdout, result.stderr
        report: dict[str, Any] = json.loads(result.stdout)
        return report


def make_environment(folder: Path, *packages: Path) -> Environment:
    venv.create(folder, with_pip=False)
    here = Path(sysconfig.get_path("purelib"))
    there = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for entry in here.iterdir():
        ours = "opsin" in entry.name or entry.suffix == ".pth" or entry.name == "__pycache__"
        if not ours:
            (there / entry.name).symlink_to(entry)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install"),
            *("--no-index", "--no-build-isolation", "--disable-pip-version-check", *map(str, packages)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return Environment(folder)


@pytest.fixture(scope="module")
def without_models(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Core and the CPU, no model plugin."""
    return make_environment(tmp_path_factory.mktemp("without") / "env", CORE, CPU)


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Core, the CPU, and somebody else's models and device."""
    packages = (CORE, CPU, *(THIRD_PARTY / name for name in AT_1_0))
    return make_environment(tmp_path_factory.mktemp("third_party") / "env", *packages)


# --------------------------------------------------------------------------------------------------
# Somebody else's plugins, written for API 1.0
# --------------------------------------------------------------------------------------------------

AT_1_0 = {
    "family_model": "d380a0ad1fd969bd",
    "toy_device": "4e82d97a2651335b",
    "toy_model": "05e302304d9bd560",
}
"""Folder -> hash of its files."""


@pytest.mark.parametrize("name", AT_1_0)
def test_third_party_plugins_are_those_of_api_1_0(name: str) -> None:
    folder = THIRD_PARTY / name
    files = [folder / "pyproject.toml", *sorted((folder / "src").rglob("*.py"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode() + file.read_bytes())
    assert digest.hexdigest()[:16] == AT_1_0[name], "a plugin of an older API does not change; see its README"


def test_third_party_plugins_are_found(third_party: Environment) -> None:
    report = third_party.report("plugins")
    assert report["failures"] == []
    assert {p["name"]: p["distribution"] for p in report["plugins"]} == {
        "acme_family_model": "acme-family-model 0.3.0",
        "acme_toy_device": "acme-toy-device 0.0.1",
        "acme_toy_model": "acme-toy-model 1.2.3",
        "device_cpu": "opsin-device-cpu 0.1.0",
    }
    owners = {f"{p['kind']}:{p['key']}": p["plugin"] for p in report["provides"]}
    assert owners["model:AcmeToyForConditionalGeneration"] == "acme_toy_model"
    assert owners["device:toychip"] == "acme_toy_device"
    assert owners["kernel:toychip/rms_norm"] == "acme_toy_device"


def test_third_party_device_probes_and_opens(third_party: Environment) -> None:
    report = third_party.report("doctor", "--device", "toychip")
    assert report["advice"] == []
    assert report["device"] == "toychip:0"
    assert report["opened"]["dtypes"] == "float32"
    probes = {device["name"]: device for device in report["devices"]}
    assert probes["toychip"]["score"] == 50
    assert probes["toychip"]["details"] == {"revision": "A0"}
    assert probes["cpu"]["score"] == 1
    kernels = {kernel["op"]: kernel["from"] for kernel in report["kernels"] if kernel["device"] == "toychip"}
    assert kernels.pop("rms_norm") == "acme_toy_device"
    assert set(kernels.values()) == {"reference"}


@pytest.mark.parametrize(("colour", "device"), [("green", "auto"), ("blue", "cpu")])
def test_third_party_model_sees(third_party: Environment, tmp_path: Path, colour: str, device: str) -> None:
    Image.new("RGB", (9, 6), colour).save(tmp_path / "picture.png")
    arguments = ("--image", str(tmp_path / "picture.png"), "--device", device, "--verbose")
    result = third_party.opsin("generate", "acme/toy", *arguments, "which colour ?")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == colour
    chosen = "toychip" if device == "auto" else "cpu"
    assert f"kernels of {chosen}: " in result.stderr


def test_third_party_model_answers_a_batch_through_python(third_party: Environment) -> None:
    code = """
from PIL import Image
from opsin import LLM, SamplingParams
llm = LLM("acme/toy", max_num_batched_tokens=8)
def ask(colour, size):
    image = {"type": "image_pil", "image_pil": Image.new("RGB", size, colour)}
    return [{"role": "user", "content": [image, {"type": "text", "text": "which colour ?"}]}]
questions = [ask(*pair) for pair in [("red", (8, 8)), ("blue", (1, 1)), ("blue", (2, 3)), ("green", (5, 2))]]
answers = llm.chat(questions, SamplingParams(temperature=0), use_tqdm=False, on_error="return")
for answer in answers:
    print(answer.error or answer.outputs[0].text.strip())
"""
    result = third_party.python(code)
    assert result.returncode == 0, result.stderr
    red, bad, blue, green = result.stdout.splitlines()
    assert (red, blue, green) == ("red", "blue", "green")
    assert "got a picture of 1x1 pixels, expected at least 2x2" in bad


def test_third_party_family_generates_what_it_did(third_party: Environment) -> None:
    """Vision tower, M-RoPE, several pictures in a batch, tied and untied head."""
    code = """
import json, sys
import numpy as np
from PIL import Image
from opsin import LLM, SamplingParams
pixels = np.indices((11, 7)).sum(0)[..., None] * np.array([3, 7, 11])
image = {"type": "image_pil", "image_pil": Image.fromarray(pixels.astype("uint8"))}
contents = [[image, {"type": "text", "text": "w1 w2 w3"}],
            [image, image, {"type": "text", "text": "w20"}],
            "w5 w9"]
messages = [[{"role": "user", "content": content}] for content in contents]
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
llm = LLM(sys.argv[1], device=sys.argv[2])
print(json.dumps([a.outputs[0].token_ids for a in llm.chat(messages, params, use_tqdm=False)]))
"""
    expected = {
        "acme/family-tied": [
            [11, 11, 11, 8, 8, 8, 8, 8],
            [11, 11, 11, 11, 11, 11, 11, 11],
            [7, 0, 8, 17, 0, 8, 8, 8],
        ],
        "acme/family-untied": [
            [20, 30, 3, 15, 20, 20, 30, 25],
            [20, 20, 20, 20, 20, 20, 3, 29],
            [3, 7, 17, 0, 18, 30, 0, 30],
        ],
    }
    for checkpoint, device in zip(expected, ("cpu", "toychip"), strict=True):
        result = third_party.run("python", "-c", code, checkpoint, device)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == expected[checkpoint]


def test_third_party_kernel_fulfils_the_contract(third_party: Environment) -> None:
    """Called as a plugin's own tests called it at API 1.0."""
    code = """
from acme_toy_device.plugin import opsin_register_devices, opsin_register_kernels
from opsin.testing.kernels import check_kernel, kernel_cases
[spec] = opsin_register_devices()
device = spec.open(0)
outcomes = {case.name: check_kernel(case, device, opsin_register_kernels())
            for case in kernel_cases(device.capabilities.dtypes)}
own = [name for name, outcome in outcomes.items() if outcome.provider == "toychip"]
print(len(own), all(name.startswith("rms_norm") for name in own))
"""
    result = third_party.python(code)
    assert result.returncode == 0, result.stderr
    count, only_its_own = result.stdout.split()
    assert int(count) > 0
    assert only_its_own == "True"


# --------------------------------------------------------------------------------------------------
# Something is missing: every door tells the same story
# --------------------------------------------------------------------------------------------------


def test_missing_checkpoint_names_checkpoint_architecture_and_packages(without_models: Environment) -> None:
    result = without_models.python(f"from opsin import LLM; LLM({CHECKPOINT!r})")
    error = result.stderr.splitlines()[-1]
    assert error.startswith("opsin.errors.MissingPluginError: ")
    for said in (CHECKPOINT, ARCHITECTURE, MODEL_PACKAGE, ITS_PACKAGES["package"], "pip install"):
        assert said in error
    line = without_models.opsin("generate", CHECKPOINT, "What is it?")
    assert line.returncode == 1
    assert line.stderr.startswith("opsin: ")
    assert line.stderr.count("\n") == 1
    assert MODEL_PACKAGE in line.stderr


def test_missing_architecture_names_its_package(without_models: Environment, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [ARCHITECTURE]}))
    result = without_models.opsin("generate", str(tmp_path), "What is it?")
    assert result.returncode == 1
    assert f"no plugin provides the architecture '{ARCHITECTURE}'" in result.stderr
    assert f"the package {MODEL_PACKAGE} does: pip install" in result.stderr
    assert "Plugins: device_cpu (opsin-device-cpu 0.1.0)." in result.stderr


def test_plugins_and_doctor_tell_what_is_missing(without_models: Environment) -> None:
    plugins, doctor = without_models.opsin("plugins"), without_models.opsin("doctor")
    assert plugins.returncode == 0
    assert doctor.returncode == 1
    for out in (plugins.stdout, doctor.stdout):
        advice = [line for line in out.splitlines() if line.startswith("- no plugin provides a model")]
        assert len(advice) == 1
        assert MODEL_PACKAGE in advice[0]
        assert "device_cpu" in out
    assert "device=cpu:0 is what a model would run on." in doctor.stdout


def test_installed_checkpoint_without_its_model_plugin(tmp_path: Path) -> None:
    """The demonstration checkpoint is there, what runs its architecture is not."""
    checkpoint = next(
        folder
        for folder in sorted((ROOT / "demo/checkpoints").iterdir())
        if ITS_PACKAGES["package"] in (folder / "pyproject.toml").read_text()
    )
    environment = make_environment(tmp_path / "env", CORE, CPU, checkpoint)
    said = f"no plugin provides the architecture '{ARCHITECTURE}'; the package {MODEL_PACKAGE} does"
    result = environment.opsin("generate", CHECKPOINT, "What is it?")
    assert said in result.stderr
    for command in ("plugins", "doctor"):
        report = environment.report(command)
        assert [c["name"] for c in report["checkpoints"]] == [CHECKPOINT]
        assert any(f"{CHECKPOINT}: {said}" in advice for advice in report["advice"])


# --------------------------------------------------------------------------------------------------
# A model family is uninstalled: the others stay as they are
# --------------------------------------------------------------------------------------------------

REMOVED = "opsin-models-phi3v"
FAMILIES = sorted(set(KNOWN["architectures"].values()))
RECORDED = {
    "opsin-models-internvl": ["internvl"],
    "opsin-models-llava": ["llava15", "llava_next"],
    "opsin-models-minicpmv": ["minicpmv20", "minicpmv25", "minicpmv26"],
    "opsin-models-phi3v": ["phi3v"],
    "opsin-models-qwen2vl": ["qwen2vl"],
    "opsin-models-smolvlm": ["smolvlm"],
}
"""Recorded checkpoints (tests/golden) of each package."""

ANSWER = """
import json, sys
from PIL import Image
from opsin import LLM, SamplingParams
case = json.load(open(sys.argv[1] + "/case.json"))
folder = sys.argv[1].split("/cases/")[0]
pictures = [Image.open(folder + "/../images/" + name) for name in case["images"]]
llm = LLM(folder + "/model", dtype="float32", kv_cache_memory=2**24)
prompt = {"prompt": case["prompt"], "multi_modal_data": {"image": pictures}}
settings = case.get("mm_processor_kwargs") or {}
params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
(answer,) = llm.generate({**prompt, "mm_processor_kwargs": settings}, params, use_tqdm=False)
print(json.dumps(answer.outputs[0].token_ids))
"""


def case_folder(family: str) -> Path:
    """A recorded case with one picture."""
    cases = ROOT / "tests/golden" / family / "cases"
    return next(case for case in sorted(cases.iterdir()) if case.name.startswith("single_"))


@pytest.fixture(scope="module")
def all_but_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, dict[str, Any]]:
    """Core, the CPU and every family, of which one is uninstalled; and `opsin plugins` from before."""
    plugins = [ROOT / "plugins" / name.removeprefix("opsin-").replace("-", "_") for name in FAMILIES]
    environment = make_environment(tmp_path_factory.mktemp("families") / "env", CORE, CPU, *plugins)
    before = environment.report("plugins")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", str(environment.folder / "bin/python"), "uninstall"),
            *("--yes", "--disable-pip-version-check", REMOVED),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return environment, before


def test_every_architecture_has_one_owner(all_but_one: tuple[Environment, dict[str, Any]]) -> None:
    environment, before = all_but_one
    distributions = {plugin["name"]: plugin["distribution"].split()[0] for plugin in before["plugins"]}
    assert sorted(distributions.values()) == sorted([*FAMILIES, "opsin-device-cpu"])
    assert before["failures"] == []
    owners = {
        entry["key"]: distributions[entry["plugin"]]
        for entry in before["provides"]
        if entry["kind"] == "model"
    }
    assert owners == KNOWN["architectures"]
    table = environment.opsin("plugins").stdout
    for architecture, package in KNOWN["architectures"].items():
        owner = next(name for name, distribution in distributions.items() if distribution == package)
        lines = [line for line in table.splitlines() if architecture in line]
        shown = any(owner in line for line in lines)
        assert shown == (package != REMOVED), table


def test_what_was_uninstalled_is_gone_and_the_rest_as_before(
    all_but_one: tuple[Environment, dict[str, Any]],
) -> None:
    environment, before = all_but_one
    after = environment.report("plugins")
    assert after["failures"] == []
    removed = next(p["name"] for p in before["plugins"] if p["distribution"].startswith(REMOVED))
    for key in ("name", "plugin"):
        kind = "plugins" if key == "name" else "provides"
        assert after[kind] == [entry for entry in before[kind] if entry[key] != removed]


@pytest.mark.parametrize(
    "family", [f for package, families in RECORDED.items() if package != REMOVED for f in families]
)
@pytest.mark.slow
def test_other_families_run_without_it(all_but_one: tuple[Environment, dict[str, Any]], family: str) -> None:
    folder = case_folder(family)
    result = all_but_one[0].run("python", "-c", ANSWER, str(folder))
    assert result.returncode == 0, result.stderr
    case = json.loads((folder / "case.json").read_text())
    safe = min(4, case["greedy_safe_len"])
    assert safe > 0
    assert json.loads(result.stdout.splitlines()[-1])[:safe] == case["greedy_token_ids"][:safe]


def test_its_checkpoint_names_the_package_to_install(
    all_but_one: tuple[Environment, dict[str, Any]],
) -> None:
    environment = all_but_one[0]
    (family,) = RECORDED[REMOVED]
    model = str(ROOT / "tests/golden" / family / "model")
    (architecture,) = [name for name, package in KNOWN["architectures"].items() if package == REMOVED]
    result = environment.opsin("generate", model, "What is it?")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, "one line, no traceback"
    assert f"no plugin provides the architecture '{architecture}'" in result.stderr
    assert f"the package {REMOVED} does: pip install" in result.stderr
    through_python = environment.python(f"from opsin import LLM; LLM({model!r})")
    error = through_python.stderr.splitlines()[-1]
    assert error.startswith("opsin.errors.MissingPluginError: ")
    assert f"the package {REMOVED} does: pip install" in error
