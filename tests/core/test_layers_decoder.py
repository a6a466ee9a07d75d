"""`opsin.layers.LanguageModel`: what a family inherits, and the parts that older plugins put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opsin.api import BuildContext, ForwardStep, KVGeometry, Model
from opsin.checkpoint.weights import load_weights, model_slots
from opsin.kernels import Kernels
from opsin.layers import (
    Decoder,
    DecoderConfig,
    LanguageModel,
    Linear,
    RotaryTable,
    kv_geometry,
    output_head,
)

CONFIG: Mapping[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def parts(tied: bool) -> tuple[BuildContext, DecoderConfig, RotaryTable]:
    context = BuildContext(config={}, kernels=Kernels(), dtype=torch.float32)
    return context, DecoderConfig.from_config(CONFIG, tied=tied), RotaryTable(4, 10000.0)


def language_model(*, tied: bool = False, **options: Any) -> LanguageModel:
    context, config, rotary = parts(tied)
    return LanguageModel(context, config, rotary=rotary, **options)


class Older(nn.Module):
    """A model as plugins wrote it before `LanguageModel`: a tied head is hidden in a list."""

    def __init__(self, *, tied: bool, always_named: bool = False) -> None:
        super().__init__()
        context, config, rotary = parts(tied)
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.kv_geometry = kv_geometry(config, context.parallel.world_size)
        head = output_head(context, config)
        self.model = Decoder(context, config, rotary=rotary, head=head)
        self._head = [head]
        if always_named or not tied:
            self.lm_head = head

    def weight_name(self, key: str) -> str | None:
        return key

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head[0](hidden)
        return logits


def tensors(model: nn.Module) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(slot.shape, generator=random) for name, slot in model_slots(model).items()}


def test_it_is_a_model() -> None:
    model: Model = language_model()
    assert (model.hidden_size, model.vocab_size) == (8, 12)
    assert model.kv_geometry == KVGeometry(num_layers=2, num_kv_heads=1, head_size=4)
    with pytest.raises(AssertionError, match="LanguageModel has no encoder, got 0 image items"):
        model.encode("image", [])


def test_a_head_of_its_own_is_waited_for() -> None:
    model = language_model()
    given = tensors(model)
    assert sum(name.startswith("lm_head.") for name in given) == 1
    report = load_weights(model, (pair for pair in given.items() if pair[0] != "lm_head.weight"))
    assert report.missing == ["lm_head.weight"]
    load_weights(model, given.items()).check()
    hidden = torch.randn(3, 8)
    torch.testing.assert_close(model.logits(hidden), hidden @ given["lm_head.weight"].T)


@pytest.mark.parametrize("stored", [False, True], ids=["no head stored", "head stored"])
@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_head_is_the_table_of_embeddings(stored: bool, head_first: bool) -> None:
    model = language_model(tied=True)
    given = {name: tensor for name, tensor in tensors(model).items() if name != "lm_head.weight"}
    assert model.lm_head.tied
    extra = {"lm_head.weight": given["model.embed_tokens.weight"].clone()} if stored else {}
    load_weights(model, ({**extra, **given} if head_first else {**given, **extra}).items()).check()
    hidden, table = torch.randn(3, 8), given["model.embed_tokens.weight"]
    torch.testing.assert_close(model.logits(hidden), hidden @ table.T)
    torch.testing.assert_close(model.embed(torch.tensor([5, 0])), table[[5, 0]])


@pytest.mark.parametrize("head_first", [False, True])
def test_a_stored_head_that_differs_is_a_head_of_its_own(head_first: bool) -> None:
    model = language_model(tied=True)
    given = tensors(model)
    order = sorted(given, key=lambda name: name.startswith("lm_head") != head_first)
    load_weights(model, ((name, given[name]) for name in order)).check()
    hidden = torch.randn(3, 8)
    torch.testing.assert_close(model.logits(hidden), hidden @ given["lm_head.weight"].T)
    torch.testing.assert_close(model.embed(torch.tensor([5])), given["model.embed_tokens.weight"][[5]])


def test_embeddings_need_no_head() -> None:
    given = tensors(language_model()).items()
    headless = [(name, tensor) for name, tensor in given if name != "lm_head.weight"]
    assert load_weights(language_model(), headless).missing == ["lm_head.weight"]
    load_weights(language_model(), headless, needs_head=False).check()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("always_named", [False, True])
def test_models_put_together_from_parts_go_on_working(tied: bool, always_named: bool) -> None:
    older, model = Older(tied=tied, always_named=always_named), language_model(tied=tied)
    given = {name: tensor for name, tensor in tensors(model).items() if name in model_slots(older)}
    needed = {name for name, slot in model_slots(model).items() if not slot.optional}
    assert needed <= given.keys()
    for either in (older, model):
        load_weights(either, given.items()).check()  # type: ignore[arg-type]
    hidden = torch.randn(3, 8)
    torch.testing.assert_close(older.logits(hidden), model.logits(hidden))


def test_a_plain_layer_may_be_the_tied_head() -> None:
    context, config, rotary = parts(tied=True)
    head = Linear(context, 8, 12, bias=False)
    decoder = Decoder(context, config, rotary=rotary, head=head)
    assert head.tied
    assert not list(head.slots())
    assert "embed_tokens.weight" in model_slots(decoder)


def test_no_module_is_hidden_and_none_but_layers_take_weights() -> None:
    model = language_model()
    assert isinstance(model.get_submodule("model._rotary"), RotaryTable)
    assert not any("rotary" in name for name in model_slots(model))
    for module in model.modules():
        values = [value for value in vars(module).values() if isinstance(value, (list, tuple))]
        assert not any(isinstance(item, nn.Module) for value in values for item in value)


def test_calls_run_hooks_as_in_torch() -> None:
    model = language_model()
    load_weights(model, tensors(model).items()).check()
    seen: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model.logits(torch.zeros(1, 8))
    assert seen
    assert seen[0] is logits


def test_keys_are_renamed_one_rule_after_another() -> None:
    model = language_model(
        renames={r"^outer\.": "", r"^tower\.blocks\.(\d+)\.": r"tower.layers.\1."},
        unused=(r"^tower\.layers\.(7|8)\.",),
    )
    assert model.weight_name("lm_head.weight") == "lm_head.weight"
    assert model.weight_name("outer.tower.blocks.6.weight") == "tower.layers.6.weight"
    assert model.weight_name("outer.tower.blocks.7.weight") is None
    assert model.weight_name("outer.tower.blocks.70.weight") == "tower.layers.70.weight"


def test_a_step_goes_through_all_layers() -> None:
    model = language_model()
    with pytest.raises(ValueError, match="zip"):  # a cache layer for each of the two
        model(ForwardStep(embeds=torch.zeros(1, 8), positions=torch.zeros(1, 1).long(), kv=[], plan=None))
