"""Adapters that peft has written, merged at load, give what peft's merged weights give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opsin import LLM, SamplingParams
from opsin.errors import CheckpointError, ConfigError
from tests.models.families import FAMILIES
from tests.models.golden import GOLDEN, cases

peft = pytest.importorskip("peft")

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0, prompt_logprobs=0)
DECODER = (
    r".*(?<!cross_attn)\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv_proj|gate_up_proj)$"
)


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        key: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def skeleton(tensors: dict[str, Tensor]) -> nn.Module:
    """A tree of linear layers and embeddings with a checkpoint's names and weights: what peft looks at."""
    root = nn.Module()
    for key, tensor in tensors.items():
        path, _, last = key.rpartition(".")
        if last != "weight" or tensor.ndim != 2:
            continue
        parent = root
        *folders, name = path.split(".")
        for part in folders:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        rows, columns = tensor.shape
        layer: nn.Module = (
            nn.Embedding(rows, columns) if name == "embed_tokens" else nn.Linear(columns, rows, bias=False)
        )
        layer.weight = nn.Parameter(tensor.float().clone(), requires_grad=False)
        parent.add_module(name, layer)
    return root


def adapt(root: nn.Module, folder: Path, *, seed: int = 0, **settings: Any) -> nn.Module:
    """Put a LoRA with weights that matter on a tree; save it as peft does; return the merged tree."""
    model = peft.get_peft_model(root, peft.LoraConfig(**{"r": 4, "target_modules": DECODER, **settings}))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.15)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)
    model.save_pretrained(folder)
    merged: nn.Module = model.merge_and_unload()
    return merged


def merged_checkpoint(family: str, merged: nn.Module, folder: Path) -> Path:
    """A copy of a recorded checkpoint with the weights of a tree."""
    source = GOLDEN / family / "model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = {name: parameter.detach() for name, parameter in merged.named_parameters()}
    tensors = stored(source)
    whole = {key: weights.get(key, tensor).to(tensor.dtype).contiguous() for key, tensor in tensors.items()}
    whole |= {key: tensor.contiguous() for key, tensor in weights.items() if key not in whole}
    save_file(whole, folder / "model.safetensors")
    return folder


def answers(family: str, folder: Path, **settings: Any) -> list[Any]:
    prompts = [case.prompt() for case in cases(family)[:3]]
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**22, **settings) as llm:
        return llm.generate(prompts, PARAMS, use_tqdm=False)


def compare(found: Sequence[Any], expected: Sequence[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        for mine, theirs in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            for token, logprob in mine.items():
                assert abs(logprob.logprob - theirs[token].logprob) < 1e-4


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A family, an adapter for it, and the checkpoint that peft merged."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    merged = adapt(skeleton(stored(GOLDEN / family / "model")), folder / "adapter")
    return family, folder / "adapter", merged_checkpoint(family, merged, folder / "merged")


def test_tokens_are_those_of_pefts_merged_model(trained: tuple[str, Path, Path]) -> None:
    family, adapter, merged = trained
    base = GOLDEN / family / "model"
    expected, found = answers(family, merged), answers(family, base, lora=str(adapter))
    compare(found, expected)
    untouched = answers(family, base)
    assert [o.outputs[0].logprobs for o in untouched] != [o.outputs[0].logprobs for o in expected]


@pytest.mark.parametrize("family", ["qwen2vl", "phi3v"])
def test_on_two_ranks(family: str, tmp_path: Path) -> None:
    merged = adapt(skeleton(stored(GOLDEN / family / "model")), tmp_path / "adapter")
    expected = answers(family, merged_checkpoint(family, merged, tmp_path / "merged"))
    base = GOLDEN / family / "model"
    compare(answers(family, base, lora=str(tmp_path / "adapter"), tensor_parallel_size=2), expected)


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "lora_alpha": 16},
    "ranks and alphas by pattern": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"v_proj": 3},
    },
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "a head of its own": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "the tower": {"target_modules": r".*blocks\.\d+\.attn\.(qkv|proj)"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_can_do_to_an_adapter(variant: str, tmp_path: Path) -> None:
    tensors = stored(GOLDEN / "qwen2vl" / "model")
    if variant == "a head of its own" and "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    merged = adapt(skeleton(tensors), tmp_path / "adapter", **VARIANTS[variant])
    expected = answers("qwen2vl", merged_checkpoint("qwen2vl", merged, tmp_path / "merged"))
    found = answers("qwen2vl", GOLDEN / "qwen2vl" / "model", lora=str(tmp_path / "adapter"))
    compare(found, expected)


def test_several_in_order_each_with_its_scale(tmp_path: Path) -> None:
    tensors = stored(GOLDEN / "qwen2vl" / "model")
    first = adapt(skeleton(tensors), tmp_path / "one", seed=1)
    second = adapt(skeleton(tensors), tmp_path / "two", seed=2, r=3, target_modules=["v_proj", "up_proj"])
    deltas = [
        {name: weight - tensors[name].float() for name, weight in tree.named_parameters()}
        for tree in (first, second)
    ]
    root = skeleton(tensors)
    with torch.no_grad():
        for name, weight in root.named_parameters():
            weight += 0.5 * deltas[0][name] - 2 * deltas[1][name]
    expected = answers("qwen2vl", merged_checkpoint("qwen2vl", root, tmp_path / "merged"))
    both = {"lora": [tmp_path / "one", tmp_path / "two"], "lora_scale": [0.5, -2]}
    compare(answers("qwen2vl", GOLDEN / "qwen2vl" / "model", **both), expected)
    with pytest.raises(ConfigError, match="3 values for 2 adapters"):
        answers("qwen2vl", GOLDEN / "qwen2vl" / "model", **{**both, "lora_scale": [1, 2, 3]})


def test_names_of_todays_transformers(tmp_path: Path) -> None:
    """An adapter trained on transformers' own class, against that class with the adapter merged."""
    transformers = pytest.importorskip("transformers")
    folder = GOLDEN / "qwen2vl" / "model"
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    merged = adapt(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    keys = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert any("model.model.language_model.layers.0" in key for key in keys), "the newer generation of names"
    ids = list(range(40, 70))
    with torch.inference_mode():
        logits = merged(input_ids=torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**22, lora=str(tmp_path / "adapter")) as llm:
        [output] = llm.generate({"prompt_token_ids": ids}, PARAMS, use_tqdm=False)
    for place, given in enumerate(output.prompt_logprobs[1:]):
        for token, logprob in given.items():
            assert abs(logprob.logprob - float(expected[place, token])) < 1e-4


def test_rounded_after_it_was_merged(tmp_path: Path) -> None:
    """int8 rounds the sum, not the base."""
    merged = adapt(skeleton(stored(GOLDEN / "qwen2vl" / "model")), tmp_path / "adapter")
    folder = merged_checkpoint("qwen2vl", merged, tmp_path / "merged")
    expected = answers("qwen2vl", folder, quantization="int8")
    base = GOLDEN / "qwen2vl" / "model"
    compare(answers("qwen2vl", base, quantization="int8", lora=str(tmp_path / "adapter")), expected)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    adapt(skeleton(stored(GOLDEN / "qwen2vl" / "model")), tmp_path / "adapter", target_modules=["q_proj"])
    return tmp_path / "adapter"


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora=True: adapters of this kind are not merged"),
    "pissa": ({"init_lora_weights": "pissa"}, "training began from other weights"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "activated": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    "a future setting": ({"use_whatever": 3}, "use_whatever=3"),
    "no rank": ({"r": None}, "r is None; expected a number"),
    "another rank": ({"r": 7}, "are not of rank 7"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_are_not_followed_are_refused(what: str, adapter: Path) -> None:
    changes, text = REFUSED[what]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=text):
        LLM(str(GOLDEN / "qwen2vl" / "model"), lora=str(adapter))


def rewritten(adapter: Path, tensors: dict[str, Tensor]) -> None:
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, adapter / "adapter_model.safetensors"
    )


def test_tensors_without_a_place_are_refused(adapter: Path) -> None:
    base = str(GOLDEN / "qwen2vl" / "model")
    good = load_file(adapter / "adapter_model.safetensors")
    name = next(key for key in good if key.endswith("lora_A.weight"))
    other = name.replace("lora_A", "lora_B")
    wrong: list[tuple[dict[str, Tensor], str]] = [
        (
            {key.replace("layers.0", "layers.40"): tensor for key, tensor in good.items()},
            "no weight in this checkpoint",
        ),
        ({**good, other: torch.zeros(3, 4)}, "for another model"),
        ({key: tensor for key, tensor in good.items() if key != other}, "has only lora_A"),
        ({**good, name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(4)}, "has no place"),
        ({**good, name.replace("lora_A.weight", "lora_B.bias"): torch.ones(4)}, "has no place"),
    ]
    for tensors, text in wrong:
        rewritten(adapter, tensors)
        with pytest.raises(CheckpointError, match=text):
            LLM(base, lora=str(adapter))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, which is not read"):
        LLM(base, lora=str(adapter))
    with pytest.raises(CheckpointError, match="it is no LoRA adapter"):
        LLM(base, lora=base)
