"""Folders as people have them: heads, shards, constants, wrappers, quantised weights, what is no model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opsin import LLM, SamplingParams
from opsin.errors import CheckpointError, MissingPluginError
from tests.models.golden import GOLDEN

PROMPT = [5, 20, 30, 40, 50]


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of a recorded checkpoint; the family is the parameter."""
    copy = tmp_path / "model"
    shutil.copytree(
        GOLDEN / getattr(request, "param", "qwen2vl") / "model", copy, copy_function=shutil.copyfile
    )
    return copy


def edit(folder: Path, **changes: Any) -> None:
    """None takes a field out."""
    changed = json.loads((folder / "config.json").read_text()) | changes
    text = json.dumps({name: value for name, value in changed.items() if value is not None})
    (folder / "config.json").write_text(text)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    file.unlink()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)


def tokens(folder: Path, **settings: Any) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**22, **settings) as llm:
        [output] = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    return output.outputs[0].token_ids


# ---- heads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("nested", [True, False, None])
@pytest.mark.parametrize("folder", ["llava15"], indirect=True)
def test_a_head_in_the_file_is_used_whatever_the_flags_say(
    folder: Path, top: bool | None, nested: bool | None
) -> None:
    key = "language_model.lm_head.weight"
    rewrite(folder, lambda tensors: {**tensors, key: tensors[key].roll(7, 0)})
    expected = tokens(folder)
    assert expected != tokens(GOLDEN / "llava15" / "model")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    if nested is not None:
        text["tie_word_embeddings"] = nested
    edit(folder, tie_word_embeddings=top, text_config=text)
    assert tokens(folder) == expected


def test_a_tied_model_with_a_head_of_its_own(folder: Path) -> None:
    same = tokens(folder)
    table = "model.embed_tokens.weight"
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": tensors[table].clone()})
    assert tokens(folder) == same
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": tensors[table].roll(7, 0)})
    own = tokens(folder)
    edit(folder, tie_word_embeddings=False)
    assert own == tokens(folder) != same


def test_embeddings_need_no_head(folder: Path) -> None:
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"1 missing \(lm_head.weight\)"):
        tokens(folder)
    vectors = []
    for model in (folder, GOLDEN / "qwen2vl" / "model"):
        with LLM(str(model), dtype="float32", task="embed", kv_cache_memory=2**22) as llm:
            [output] = llm.embed({"prompt_token_ids": PROMPT}, use_tqdm=False)
            assert output.outputs is not None
            vectors.append(output.outputs.embedding)
    assert vectors[0] == vectors[1]


# ---- shards, constants, copies --------------------------------------------------------------------------


def test_the_index_says_which_copy_counts(folder: Path) -> None:
    expected = tokens(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stale = {key: torch.zeros_like(tensor) for key, tensor in list(tensors.items())[:3]}
    save_file({**tensors}, folder / "model-00002-of-00002.safetensors")
    save_file(stale, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="both have the tensor .*, and no index says which counts"):
        tokens(folder)
    weight_map = dict.fromkeys(tensors, "model-00002-of-00002.safetensors") | {
        "absent": "model-00001-of-00002.safetensors"
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert tokens(folder) == expected
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(CheckpointError, match="weight_map must be an object of file names"):
        tokens(folder)


@pytest.mark.parametrize(
    "folder",
    ["qwen2vl", "llava15", "llava_next", "phi3v", "minicpmv20", "minicpmv25", "minicpmv26"],
    indirect=True,
)
def test_constants_and_zero_biases_are_passed_over(folder: Path) -> None:
    expected = tokens(folder)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "vision_model.embeddings.position_ids": torch.arange(4),
        "model.layers.0.mlp.up_proj.bias": torch.zeros(8),
    }
    rewrite(folder, lambda tensors: {**tensors, **extra})
    assert tokens(folder) == expected
    rewrite(folder, lambda tensors: {**tensors, "model.layers.0.mlp.up_proj.bias": torch.ones(8)})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(model.layers.0.mlp.up_proj.bias"):
        tokens(folder)


# ---- refused by what they are ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_quantised_tensors_never_land_in_a_layer(folder: Path, dtype: torch.dtype) -> None:
    key = "model.layers.1.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: {**tensors, key: tensors[key].to(dtype)})
    with pytest.raises(CheckpointError, match=rf"tensor {key} is {str(dtype)[6:]}, .*quantised weights"):
        tokens(folder)


@pytest.mark.parametrize("method", ["hqq", "quanto", "eetq"])
@pytest.mark.parametrize("nested", [False, True])
def test_methods_of_quantisation_that_nobody_reads_are_named(folder: Path, method: str, nested: bool) -> None:
    quantised = {"quantization_config": {"quant_method": method, "bits": 4}}
    edit(folder, **({"text_config": quantised} if nested else quantised))
    with pytest.raises(MissingPluginError, match=f"quantisation method '{method}'"):
        tokens(folder)


@pytest.mark.parametrize(
    ("family", "key", "shape"),
    [
        ("qwen2vl", "model.layers.0.mlp.up_proj.weight", None),
        ("qwen2vl", "visual.patch_embed.proj.weight", None),
        ("phi3v", "model.layers.0.mlp.gate_up_proj.weight", None),
        ("minicpmv20", "vpm.patch_embed.proj.weight", None),
        ("llava15", "vision_tower.vision_model.embeddings.patch_embedding.weight", (48, 588)),
    ],
)
def test_a_tensor_of_another_shape_is_refused(
    tmp_path: Path, family: str, key: str, shape: tuple[int, ...] | None
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / family / "model", folder, copy_function=shutil.copyfile)

    def flipped(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1) if shape is None else tensor.reshape(shape)

    rewrite(folder, lambda tensors: {**tensors, key: flipped(tensors[key])})
    with pytest.raises(CheckpointError, match=rf"tensor {key} has shape"):
        tokens(folder)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("module.", "DistributedDataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("base_model.model.", "peft"),
        ("base_model.", "peft or another wrapper"),
    ],
)
def test_keys_of_a_wrapper_are_refused_by_its_name(folder: Path, prefix: str, words: str) -> None:
    rewrite(folder, lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=f"begin with '{prefix.split('.')[0]}.' .*{words}"):
        tokens(folder)


def test_an_adapter_names_its_base(folder: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(CheckpointError, match=r"adapter \(LORA\) for 'Qwen/Qwen2-VL-2B-Instruct'"):
        tokens(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter \(LORA\) for 'Qwen/Qwen2-VL-2B-Instruct'"):
        tokens(folder)


def test_gguf_files_and_pickles_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.Q4_K_M.gguf")
    with pytest.raises(CheckpointError, match=r"no weights: .*model.Q4_K_M.gguf .GGUF is not read"):
        tokens(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds GGUF files \(model.Q4_K_M.gguf\)"):
        tokens(folder)
    with pytest.raises(CheckpointError, match="is a GGUF file, which is not read"):
        tokens(folder / "model.Q4_K_M.gguf")


# ---- ends of text, chat templates -----------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["qwen2vl", "llava15", "phi3v", "minicpmv26"], indirect=True)
def test_the_tokenizers_own_end_ends_a_text(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    (folder / "generation_config.json").write_text("{}")
    edit(folder, eos_token_id=None)
    own = PreTrainedTokenizerFast.from_pretrained(folder).eos_token_id
    assert own is not None
    with LLM(str(folder), kv_cache_memory=2**22) as llm:
        assert own in llm.engine.frontend.eos_token_ids


def test_ends_that_are_no_ids_are_refused(folder: Path) -> None:
    edit(folder, eos_token_id="<|im_end|>")
    with pytest.raises(CheckpointError, match=r"eos_token_id is \['<|im_end|>'\]; expected an integer"):
        tokens(folder)


def test_a_named_chat_template_is_chosen_by_its_name(folder: Path) -> None:
    (folder / "chat_template.json").unlink()
    named = [{"name": "default", "template": "plain"}, {"name": "rag", "template": "with documents"}]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": named}))

    def template(**settings: Any) -> str:
        with LLM(str(folder), kv_cache_memory=2**22, **settings) as llm:
            template = llm.engine.frontend.renderer.template
            assert template is not None
            return template.source

    assert template() == "plain"
    assert template(chat_template="rag") == "with documents"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": named[1:]}))
    with pytest.raises(CheckpointError, match="chat templates named rag, and none named default"):
        template()
    assert template(chat_template="rag") == "with documents"
    (folder / "chat_template.jinja").write_text("from a file")
    assert template() == "from a file"


def test_a_template_for_tools_is_used_as_soon_as_there_are_tools(folder: Path) -> None:
    for_tools = folder / "additional_chat_templates" / "tool_use.jinja"
    for_tools.parent.mkdir()
    for_tools.write_text("{% for tool in tools %}{{ tool.function.name }}{% endfor %}")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    messages: Any = [{"role": "user", "content": "hello"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]

    def prompts(**settings: Any) -> list[str | None]:
        with LLM(str(folder), kv_cache_memory=2**22, **settings) as llm:
            params = SamplingParams(max_tokens=1)
            return [llm.chat(messages, params, False, tools=given)[0].prompt for given in (None, tools)]

    assert prompts() == ["hello", "look"]
    assert prompts(chat_template="{{ messages[0].content }}{# tools #}!") == ["hello!", "hello!"]


# ---- what plugins make of it ----------------------------------------------------------------------------


def test_a_field_that_a_plugin_misses_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import opsin_models_qwen2vl.model as family

    def reads(name: str) -> Callable[[Any], Any]:
        return lambda config: config[name] + 1

    for builder, words in (
        (reads("absent"), "opsin_models_qwen2vl.plugin needs the field 'absent', which is not there"),
        (reads("hidden_act"), "opsin_models_qwen2vl.plugin cannot follow them: TypeError"),
        (lambda config: None, "cannot follow them: TypeError: .*NoneType"),
    ):
        monkeypatch.setattr(family, "read_config", builder)
        with pytest.raises(CheckpointError, match=words):
            tokens(folder)
