"""Every rule of loading plugins: what is found, what is refused, who wins, and what the messages say."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import opsin.hookspecs
from opsin import hookimpl
from opsin.api import (
    Capabilities,
    Device,
    DeviceSpec,
    InputMapperSpec,
    KernelSpec,
    MemoryInfo,
    ModelSpec,
    PlaceholderSpec,
    Probe,
)
from opsin.errors import ConfigError, MissingPluginError, PluginConflictError, PluginError
from opsin.plugins import Plugins, load_plugins
from opsin.plugins.contract import HOOKS


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPSIN_PLUGINS", "OPSIN_DISABLE_PLUGINS", "OPSIN_PREFER"):
        monkeypatch.delenv(variable, raising=False)


def never(*args: Any) -> Any:
    raise AssertionError("specs are not used while loading")


def plugin(**specs: Any) -> SimpleNamespace:
    """A plugin object: hook name without its prefix -> what the hook returns."""

    def hook(name: str, value: Any) -> Any:
        def implementation() -> Any:
            return value

        implementation.__name__ = name
        return hookimpl(implementation)

    return SimpleNamespace(
        **{f"opsin_register_{n}": hook(f"opsin_register_{n}", v) for n, v in specs.items()}
    )


def model(architecture: str = "Toy") -> ModelSpec:
    return ModelSpec(architecture=architecture, build=never)


def device(name: str, probe: Any = None) -> DeviceSpec:
    return DeviceSpec(
        name=name, torch_type=name, probe=probe or (lambda: Probe(score=1, reason="here")), open=never
    )


def load(entry_points: Any = (), **options: Any) -> Plugins:
    return load_plugins(entry_points=entry_points, **options)


def write_plugin(folder: Path, module: str, source: str) -> EntryPoint:
    """A plugin module in a folder on sys.path; a marker file says whether it was imported."""
    marker = folder / f"{module}.imported"
    text = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n{source}"
    (folder / f"{module}.py").write_text(text)
    return EntryPoint(name=module, value=module, group="opsin.v1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


GOOD_SOURCE = """
from opsin import hookimpl
from opsin.api import ModelSpec

@hookimpl
def opsin_register_models():
    return [ModelSpec(architecture={architecture!r}, build=None)]
"""


def test_every_hook_specification_is_indexed() -> None:
    specified = {name for name in vars(opsin.hookspecs) if name.startswith("opsin_")}
    assert specified == set(HOOKS)


def test_index_of_everything() -> None:
    image = InputMapperSpec(architecture="Toy", modality="image", build=never)
    video = InputMapperSpec(architecture="Toy", modality="video", build=never)
    written = PlaceholderSpec(architecture="Toy", modality="image", build=never)
    norm = KernelSpec(device="chip", op="rms_norm", load=never)
    act = KernelSpec(device="chip", op="gated_act", load=never)
    found = load(
        extra={
            "toys": plugin(models=[model()], input_mappers=(video, image), placeholders=[written]),
            "chips": plugin(devices=[device("chip")], kernels=[norm, act]),
        }
    )
    assert found.model("Toy").architecture == "Toy"
    assert found.input_mappers("Toy") == {"image": image, "video": video}
    assert found.placeholders("Toy") == {"image": written}
    assert found.input_mappers("Other") == {}
    assert found.device_spec("chip").name == "chip"
    assert found.kernel_specs("chip") == (act, norm)
    assert found.kernel_specs("other") == ()
    rows = [(claim.kind, claim.key, claim.plugin.name) for claim in found.claims]
    assert rows == [
        ("model", "Toy", "toys"),
        ("input_mapper", "Toy/image", "toys"),
        ("input_mapper", "Toy/video", "toys"),
        ("placeholder", "Toy/image", "toys"),
        ("device", "chip", "chips"),
        ("kernel", "chip/gated_act", "chips"),
        ("kernel", "chip/rms_norm", "chips"),
    ]


def test_loading_keeps_no_state() -> None:
    load(extra={"toys": plugin(models=[model()])})
    assert load().claims == ()


# --------------------------------------------------------------------------------------------------
# Entry points
# --------------------------------------------------------------------------------------------------


def test_broken_plugin_is_kept_with_its_reason(folder: Path) -> None:
    broken = write_plugin(folder, "broken_import", "import a_module_nobody_has\n")
    good = write_plugin(folder, "good_beside_it", GOOD_SOURCE.format(architecture="Good"))
    found = load([broken, good])
    assert found.model("Good")
    assert [failure.plugin.name for failure in found.failures] == ["broken_import"]
    with pytest.raises(MissingPluginError, match=r"broken_import.*No module named 'a_module_nobody_has'"):
        found.model("Missing")


def test_hook_that_raises_is_a_failure_of_its_plugin(folder: Path) -> None:
    source = """
from opsin import hookimpl
from opsin.api import DeviceSpec, ModelSpec

@hookimpl
def opsin_register_models():
    return [ModelSpec(architecture="Half", build=None)]

@hookimpl
def opsin_register_devices():
    return [DeviceSpec(name="chip", a_field_from_the_future=1)]
"""
    found = load([write_plugin(folder, "raising_hook", source)])
    assert found.claims == ()
    assert "a_field_from_the_future" in found.failures[0].reason
    assert found.loaded == ()


def test_module_that_exits_is_a_failure(folder: Path) -> None:
    found = load([write_plugin(folder, "exiting", "raise SystemExit('no chip')\n")])
    assert found.failures[0].reason == "SystemExit: no chip"


def test_broken_plugin_is_fatal_when_named(folder: Path) -> None:
    broken = write_plugin(folder, "broken_named", "raise OSError('libchip.so not found')\n")
    with pytest.raises(PluginError, match=r"broken_named.*asked for.*libchip\.so not found"):
        load([broken], allow=["broken_named"])


def test_plugin_for_another_major_is_reported_without_being_imported(folder: Path) -> None:
    write_plugin(folder, "from_the_future", "raise AssertionError('imported')\n")
    newer = EntryPoint(name="from_the_future", value="from_the_future", group="opsin.v2")
    older = EntryPoint(name="from_the_past", value="from_the_future", group="opsin.v0")
    foreign = EntryPoint(name="foreign", value="from_the_future", group="opsin.checkpoints.v1")
    found = load([newer, older, foreign])
    assert not (folder / "from_the_future.imported").exists()
    reasons = {failure.plugin.name: failure.reason for failure in found.failures}
    assert set(reasons) == {"from_the_future", "from_the_past"}
    assert "plugin API 2" in reasons["from_the_future"]
    assert "upgrade opsin" in reasons["from_the_future"]
    assert "upgrade the plugin" in reasons["from_the_past"]
    with pytest.raises(PluginError, match="plugin API 2"):
        load([newer], allow=["from_the_future"])


def test_package_serving_two_majors_is_taken_by_ours(folder: Path) -> None:
    ours = write_plugin(folder, "two_majors", GOOD_SOURCE.format(architecture="Good"))
    theirs = EntryPoint(name="two_majors", value="two_majors", group="opsin.v2")
    for order in ([ours, theirs], [theirs, ours]):
        found = load(order)
        assert found.failures == ()
        assert found.model("Good")


def test_two_plugins_of_one_name(folder: Path) -> None:
    first = write_plugin(folder, "first_of_two", GOOD_SOURCE.format(architecture="A"))
    second = EntryPoint(name="first_of_two", value="second_of_two", group="opsin.v1")
    with pytest.raises(PluginConflictError, match=r"'first_of_two'.*first_of_two and .*second_of_two"):
        load([first, second])
    assert load([first, second], deny=["first_of_two"]).loaded == ()


# --------------------------------------------------------------------------------------------------
# Allow and deny
# --------------------------------------------------------------------------------------------------


def test_denied_plugin_is_not_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = write_plugin(folder, "unwanted", GOOD_SOURCE.format(architecture="Unwanted"))
    other = write_plugin(folder, "other_unwanted", GOOD_SOURCE.format(architecture="Other"))
    monkeypatch.setenv("OPSIN_DISABLE_PLUGINS", "other_unwanted, absent")
    found = load([entry, other], deny=["unwanted"])
    assert not list(folder.glob("*.imported"))
    assert [p.name for p in found.disabled] == ["other_unwanted", "unwanted"]
    with pytest.raises(MissingPluginError, match="Switched off: .*unwanted"):
        found.model("Unwanted")


@pytest.mark.parametrize("through", ["argument", "environment"])
def test_allowed_plugins_only(folder: Path, monkeypatch: pytest.MonkeyPatch, through: str) -> None:
    wanted = write_plugin(folder, f"wanted_{through}", GOOD_SOURCE.format(architecture="Wanted"))
    other = write_plugin(folder, f"ignored_{through}", "raise AssertionError('imported')\n")
    if through == "environment":
        monkeypatch.setenv("OPSIN_PLUGINS", wanted.name)
    found = load([wanted, other], allow=[wanted.name] if through == "argument" else None)
    assert [p.name for p in found.loaded] == [wanted.name]
    assert not (folder / f"{other.name}.imported").exists()


def test_named_but_missing_plugin() -> None:
    with pytest.raises(
        MissingPluginError, match=r"'device_cpuu'.*not installed \(did you mean 'device_cpu'\?\)"
    ):
        load(extra={"device_cpu": plugin()}, allow=["device_cpuu"])


def test_allowed_and_denied_at_once() -> None:
    with pytest.raises(ConfigError, match="allow list and in the deny list"):
        load(extra={"toys": plugin()}, allow=["toys"], deny=["toys"])


# --------------------------------------------------------------------------------------------------
# The contract
# --------------------------------------------------------------------------------------------------


def test_misspelt_hook() -> None:
    with pytest.raises(
        PluginError, match=r"toys.*no hook opsin_register_model \(did you mean 'opsin_register_models'\?\)"
    ):
        load(extra={"toys": plugin(model=[model()])})


def test_unknown_hook_without_a_near_name_lists_the_hooks() -> None:
    @hookimpl
    def entirely_else() -> None: ...

    with pytest.raises(PluginError, match=r"no hook entirely_else; the hooks are .*opsin_register_kernels"):
        load(extra={"toys": SimpleNamespace(entirely_else=entirely_else)})


def test_optional_hook_of_a_later_minor_is_ignored() -> None:
    @hookimpl(optionalhook=True)
    def opsin_register_audio() -> None: ...

    found = load(extra={"toys": SimpleNamespace(opsin_register_audio=opsin_register_audio)})
    assert [p.name for p in found.loaded] == ["toys"]


def test_unmarked_hook() -> None:
    def opsin_register_models() -> Any:
        return [model()]

    with pytest.raises(PluginError, match=r"toys.*opsin_register_models is not marked with @hookimpl"):
        load(extra={"toys": SimpleNamespace(opsin_register_models=opsin_register_models)})


def test_unknown_argument() -> None:
    @hookimpl
    def opsin_register_models(config: Any) -> Any:
        return [model()]

    with pytest.raises(PluginError, match=r"toys.*opsin_register_models has an unknown argument 'config'"):
        load(extra={"toys": SimpleNamespace(opsin_register_models=opsin_register_models)})


def test_wrapper_around_other_plugins() -> None:
    @hookimpl(wrapper=True)
    def opsin_register_models() -> Any:
        yield
        return []

    with pytest.raises(PluginError, match="toys.*opsin_register_models is a hook wrapper"):
        load(extra={"toys": SimpleNamespace(opsin_register_models=opsin_register_models)})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None, expected a sequence of ModelSpec"),
        (model(), "returned ModelSpec .*, expected a sequence of ModelSpec"),
        ("Toy", "returned str 'Toy', expected a sequence of ModelSpec"),
        ((spec for spec in ()), "returned generator .*, expected a sequence of ModelSpec"),
        ([device("chip")], "returned DeviceSpec .* in its sequence, expected ModelSpec"),
        ([model("")], r"returned a spec for \(''\,\), expected names that are not empty"),
    ],
)
def test_wrong_return_type(returned: Any, message: str) -> None:
    with pytest.raises(
        PluginError, match=f"toys.*opsin_register_models {message}.*OPSIN_DISABLE_PLUGINS=toys"
    ):
        load(extra={"toys": plugin(models=returned)})


def test_kernel_for_an_unknown_op() -> None:
    kernel = KernelSpec(device="chip", op="rmsnorm", load=never)  # type: ignore[arg-type]
    with pytest.raises(PluginError, match=r"unknown op 'rmsnorm' \(did you mean 'rms_norm'\?\)"):
        load(extra={"chips": plugin(kernels=[kernel])})


def test_one_object_under_two_names() -> None:
    toys = plugin(models=[model()])
    with pytest.raises(PluginError, match="b .*already registered"):
        load(extra={"a": toys, "b": toys})


# --------------------------------------------------------------------------------------------------
# Conflicts
# --------------------------------------------------------------------------------------------------


def rivals() -> dict[str, Any]:
    kernel = KernelSpec(device="chip", op="rms_norm", load=never)
    return {
        "alpha": plugin(models=[model()], devices=[device("chip")], kernels=[kernel]),
        "beta": plugin(
            models=[model()],
            input_mappers=[InputMapperSpec(architecture="Toy", modality="image", build=never)],
            kernels=[kernel],
        ),
        "gamma": plugin(input_mappers=[InputMapperSpec(architecture="Toy", modality="image", build=never)]),
    }


def test_two_claims_on_one_key_name_both_plugins_and_the_setting_that_decides() -> None:
    with pytest.raises(PluginConflictError) as caught:
        load(extra=rivals())
    message = str(caught.value)
    assert "model:Toy (alpha (in process) and beta (in process))" in message
    assert "input_mapper:Toy/image (beta (in process) and gamma (in process))" in message
    assert "OPSIN_PREFER=kernel:chip/rms_norm=alpha,model:Toy=alpha" in message.replace("prefer={", "")


@pytest.mark.parametrize("order", list(itertools.permutations(["alpha", "beta", "gamma"])))
def test_order_does_not_matter(order: tuple[str, ...]) -> None:
    plugins = rivals()
    extra = {name: plugins[name] for name in order}
    with pytest.raises(PluginConflictError) as caught:
        load(extra=extra)
    with pytest.raises(PluginConflictError) as again:
        load(extra=dict(sorted(extra.items())))
    assert str(caught.value) == str(again.value)
    prefer = {"model:Toy": "beta", "device:chip": "alpha"}
    assert load(extra=extra, prefer=prefer).claims == load(extra=plugins, prefer=prefer).claims


def test_preference_decides_and_covers_the_parts() -> None:
    found = load(extra=rivals(), prefer={"model:Toy": "beta", "kernel:chip/rms_norm": "beta"})
    owners = {f"{claim.kind}:{claim.key}": claim.plugin.name for claim in found.claims}
    assert owners == {
        "model:Toy": "beta",
        "input_mapper:Toy/image": "beta",
        "device:chip": "alpha",
        "kernel:chip/rms_norm": "beta",
    }


def test_own_preference_of_a_part_goes_first() -> None:
    prefer = {"model:Toy": "beta", "input_mapper:Toy/image": "gamma", "device:chip": "alpha"}
    owners = {
        f"{claim.kind}:{claim.key}": claim.plugin.name for claim in load(extra=rivals(), prefer=prefer).claims
    }
    assert owners["input_mapper:Toy/image"] == "gamma"
    assert owners["kernel:chip/rms_norm"] == "alpha"


def test_the_message_s_own_setting_works(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, str] = {}
    for _ in range(3):  # a suggested winner may leave parts that it does not claim itself
        try:
            found = load(extra=rivals())
            break
        except PluginConflictError as error:
            suggested = str(error).rsplit("OPSIN_PREFER=", 1)[1]
            settings |= dict(pair.split("=") for pair in suggested.split(","))
            monkeypatch.setenv("OPSIN_PREFER", ",".join(f"{k}={v}" for k, v in settings.items()))
    assert found.model("Toy")


def test_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSIN_PREFER", "model:Toy=a")
    extra = {"a": plugin(models=[model()]), "b": plugin(models=[model()])}
    assert load(extra=extra).claims[0].plugin.name == "a"
    assert load(extra=extra, prefer={"model:Toy": "b"}).claims[0].plugin.name == "b"


def test_preferred_plugin_that_does_not_claim_the_key(folder: Path) -> None:
    with pytest.raises(PluginError, match=r"prefer model:Toy=b: .*provided by: a"):
        load(extra={"a": plugin(models=[model()]), "b": plugin()}, prefer={"model:Toy": "b"})
    broken = write_plugin(folder, "broken_preferred", "raise OSError('no library')\n")
    with pytest.raises(PluginError, match="it failed: OSError: no library"):
        load([broken], extra={"a": plugin(models=[model()])}, prefer={"model:Toy": "broken_preferred"})


@pytest.mark.parametrize("key", ["Toy", "models:Toy", "model:"])
def test_unreadable_preference(key: str) -> None:
    with pytest.raises(ConfigError, match="expected KIND:KEY=PLUGIN"):
        load(prefer={key: "a"})


def test_one_plugin_claiming_twice() -> None:
    with pytest.raises(PluginError, match="toys .*claims model:Toy twice"):
        load(extra={"toys": plugin(models=[model(), model()])})


# --------------------------------------------------------------------------------------------------
# Devices
# --------------------------------------------------------------------------------------------------


def score(value: int, reason: str = "a reason", next_step: str = "") -> Any:
    return lambda: Probe(score=value, reason=reason, next_step=next_step)


def test_auto_takes_the_best_probe_and_the_first_name_among_equals() -> None:
    devices = [
        device("slow", score(1)),
        device("zeta", score(9)),
        device("eta", score(9)),
        device("off", score(0)),
    ]
    spec, index, probe = load(extra={"d": plugin(devices=devices)}).select_device("auto")
    assert (spec.name, index, probe.score) == ("eta", 0, 9)


def test_device_by_name_and_index() -> None:
    found = load(extra={"d": plugin(devices=[device("slow", score(1)), device("fast", score(9))])})
    assert found.select_device("slow")[0].name == "slow"
    spec, index, _ = found.select_device("slow:3")
    assert (spec.name, index) == ("slow", 3)


@pytest.mark.parametrize("name", ["", "slow:", "slow:one", "slow:-1", "slow:1:2"])
def test_unreadable_device(name: str) -> None:
    with pytest.raises(ConfigError, match='expected "auto", a name, or "name:index"'):
        load(extra={"d": plugin(devices=[device("slow")])}).select_device(name)


def test_named_but_unusable_device_says_why_and_what_to_do() -> None:
    chips = plugin(devices=[device("chip", score(0, "no driver", "install the driver"))])
    with pytest.raises(ConfigError, match="'chip' cannot be used: no driver; install the driver"):
        load(extra={"d": chips}).select_device("chip")
    with pytest.raises(ConfigError, match="no device can be used here: chip: no driver; install the driver"):
        load(extra={"d": chips}).select_device("auto")


@pytest.mark.parametrize("probe", [lambda: 1 / 0, lambda: None, lambda: sys.exit("driver said no")])
def test_a_probe_never_raises(probe: Any) -> None:
    found = load(extra={"chips": plugin(devices=[device("bad", probe), device("good", score(1))])})
    assert found.select_device("auto")[0].name == "good"
    answer = found.probe(found.device_spec("bad"))
    assert answer.score == 0
    assert "probe" in answer.reason
    assert "chips" in answer.next_step


def test_no_device_plugin_at_all() -> None:
    with pytest.raises(MissingPluginError, match="no device plugin: install one .*opsin-device-cpu"):
        load().select_device("auto")


# --------------------------------------------------------------------------------------------------
# Messages about what is missing
# --------------------------------------------------------------------------------------------------

KNOWN = json.loads((Path(opsin.hookspecs.__file__).parent / "data/known_packages.json").read_text())


@pytest.mark.parametrize(("architecture", "package"), KNOWN["architectures"].items())
def test_missing_architecture_names_its_package(architecture: str, package: str) -> None:
    with pytest.raises(MissingPluginError, match=rf"'{architecture}'.*pip install {package}.*Plugins: toys"):
        load(extra={"toys": plugin(models=[model()])}).model(architecture)


@pytest.mark.parametrize(("name", "package"), KNOWN["devices"].items())
def test_missing_device_names_its_package(name: str, package: str) -> None:
    with pytest.raises(MissingPluginError, match=rf"the device '{name}'.*pip install {package}"):
        load().device_spec(name)


def test_missing_with_a_near_name() -> None:
    with pytest.raises(
        MissingPluginError, match=r"'Toyy' \(did you mean 'Toy'\?\).*Provided architectures: Toy"
    ):
        load(extra={"toys": plugin(models=[model()])}).model("Toyy")


def test_message_about_an_installed_plugin_that_failed_does_not_say_install(folder: Path) -> None:
    architecture, package = next(iter(KNOWN["architectures"].items()))
    entry = write_plugin(folder, "installed_but_broken", "raise OSError('no library')\n")
    dist = SimpleNamespace(name=package, version="1.0")
    object.__setattr__(entry, "dist", dist) if sys.version_info < (3, 11) else vars(entry).update(dist=dist)
    with pytest.raises(MissingPluginError) as caught:
        load([entry]).model(architecture)
    assert f"{package} is installed and provides it, but its plugin failed: OSError: no library" in str(
        caught.value
    )
    assert "pip install" not in str(caught.value)
    with pytest.raises(MissingPluginError, match="'installed_but_broken' is switched off"):
        load([entry], deny=["installed_but_broken"]).model(architecture)


# --------------------------------------------------------------------------------------------------
# What loading costs
# --------------------------------------------------------------------------------------------------


def code_without_docstrings(path: Path) -> str:
    """What runs: docstrings and comments may cite the papers and projects that formulas come from."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            texts = [n for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
            node.body = [n for n in body if n not in texts] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def test_core_names_no_model_family() -> None:
    families = ("llava", "minicpm", "phi3", "phi-3", "qwen")
    core = Path(opsin.hookspecs.__file__).parent
    sources = {path: code_without_docstrings(path).lower() for path in core.rglob("*.py")}
    assert len(sources) > 10
    assert [(path.name, f) for path, code in sources.items() for f in families if f in code] == []


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded once a fresh interpreter has run some code."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_loading_the_installed_plugins_loads_neither_torch_nor_transformers() -> None:
    loaded = modules_after("from opsin.plugins import load_plugins; load_plugins()")
    assert "pluggy" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "PIL"}


def test_importing_opsin_loads_nothing_heavy() -> None:
    loaded = modules_after("import opsin; opsin.__version__")
    assert not loaded & {"torch", "transformers", "numpy", "pluggy", "cyclopts", "rich", "PIL", "dataclasses"}


def test_a_device_opens_as_what_its_plugin_declares(caplog: pytest.LogCaptureFixture) -> None:
    def opening(torch_device: str) -> Any:
        def open_it(index: int) -> Device:
            if index > 0:
                raise ValueError(f"there is no chip {index}")
            can = Capabilities(dtypes=("float32",), dtype_for={})
            memory = MemoryInfo(free_bytes=1, total_bytes=1)
            return Device(name="chip", torch_device=torch_device, capabilities=can, memory=lambda: memory)

        return open_it

    def spec(torch_device: str, **declared: Any) -> DeviceSpec:
        return DeviceSpec(
            name="chip", probe=lambda: Probe(score=1, reason=""), open=opening(torch_device), **declared
        )

    for right in (spec("chip:0", torch_type="chip"), spec("chip", torch_type="chip"), spec("anything:3")):
        assert load(extra={"chips": plugin(devices=[right])}).open_device(right, 0).name == "chip"
    assert not caplog.messages
    wrong = spec("cpu", torch_type="chip")
    plugins = load(extra={"chips": plugin(devices=[wrong])})
    assert plugins.open_device(wrong, 0).torch_device == "cpu"
    assert "opened as 'cpu', its plugin declares torch_type 'chip'; report this to" in caplog.text
    with pytest.raises(ConfigError, match="there is no chip 1"):
        plugins.open_device(wrong, 1)
