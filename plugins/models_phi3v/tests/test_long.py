"""Sequences that outgrow the short rotary factors, against transformers' Phi-3 and against themselves.

The recorded checkpoint changes its factors above 1,024 tokens. transformers has the text decoder of this
family (``Phi3ForCausalLM``) and, asked for the whole sequence at once, chooses the factors by its length.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from opsin import LLM, BeamSearchParams, SamplingParams
from opsin.testing.models import encode, process, recorded_cases, recorded_logits

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
MODEL = GOLDEN / "phi3v" / "model"
picture = recorded_cases(GOLDEN / "phi3v", GOLDEN / "images")[0].picture
SWITCH = 1024
WORDS = np.random.default_rng(0).integers(3, 590, 1500).tolist()
"""Token ids of a long text."""


def load(**settings: Any) -> LLM:
    return LLM(str(MODEL), **{"dtype": "float32", "kv_cache_memory": 2**24, **settings})


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def answers(llm: LLM, lengths: Sequence[int], max_tokens: int = 8) -> list[list[int]]:
    """Answers to the first so many of `WORDS`, as one batch."""
    prompts = [{"prompt_token_ids": WORDS[:length]} for length in lengths]
    outputs = llm.generate(prompts, greedy(max_tokens), use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with load() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    with load(enable_prefix_caching=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def theirs() -> Phi3ForCausalLM:
    config = json.loads((MODEL / "config.json").read_text())
    rope = {
        **config["rope_scaling"],
        "rope_type": "longrope",
        "rope_theta": config["rope_theta"],
        "original_max_position_embeddings": config["original_max_position_embeddings"],
    }
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings"]
    settings = {name: config[name] for name in [*names, "rms_norm_eps", "pad_token_id"]}
    model = Phi3ForCausalLM(
        Phi3Config(**settings, rope_parameters=rope, sliding_window=None, attn_implementation="eager")
    )
    weights = load_file(MODEL / "model.safetensors")
    model.load_state_dict({key: value for key, value in weights.items() if "vision" not in key})
    return model.eval()


@torch.inference_mode()
def their_logits(theirs: Phi3ForCausalLM, embeds: Tensor, tokens: Sequence[int]) -> Tensor:
    """Logits predicting each of ``tokens``, each of the whole sequence before it, computed anew."""
    table = theirs.get_input_embeddings()
    rows = []
    for count in range(len(tokens)):
        sequence = torch.cat([embeds, table(torch.tensor(tokens[:count], dtype=torch.int64))])
        rows.append(theirs(inputs_embeds=sequence[None], use_cache=False).logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [50, 2048])
@pytest.mark.parametrize("length", [300, SWITCH - 6, SWITCH - 1, SWITCH, SWITCH + 1, 1400])
def test_logits_are_those_of_the_whole_sequence_computed_anew(
    theirs: Phi3ForCausalLM, length: int, chunk: int
) -> None:
    with load(max_num_batched_tokens=chunk) as llm, recorded_logits(llm) as logits:
        tokens = answers(llm, [length], max_tokens=10)[0]
        crosses = length <= SWITCH < length + 9
        assert llm.engine.stats().num_restarts == crosses
    embeds = theirs.get_input_embeddings()(torch.tensor(WORDS[:length]))
    assert float((torch.cat(logits) - their_logits(theirs, embeds, tokens)).abs().max()) < 1e-4


def test_a_picture_is_computed_anew_with_its_sequence(theirs: Phi3ForCausalLM) -> None:
    with load() as llm:
        words = " ".join(["the", "cat", "and", "the", "rocket"] * 30)
        prompt = {
            "prompt": f"<|image_1|>\n{words}",
            "multi_modal_data": {"image": picture("coffee_320x213.png")},
        }
        processed = process(llm, prompt)
        short = SWITCH - 4 - len(processed.token_ids)
        prompt["prompt"] += " a" * short
        processed = process(llm, prompt)
        assert SWITCH - 6 < len(processed.token_ids) < SWITCH
        with recorded_logits(llm) as logits:
            [output] = llm.generate(prompt, greedy(10), use_tqdm=False)
        assert llm.engine.stats().num_restarts == 1
        assert llm.engine.stats().num_encoded == 1, "what the encoder gave is still there"
        embeds = theirs.get_input_embeddings()(torch.tensor(processed.token_ids)).detach()
        [item] = processed.media
        embeds[item.start : item.end] = encode(llm, "image", [item.mapped])[0]
    expected = their_logits(theirs, embeds, output.outputs[0].token_ids)
    assert float((torch.cat(logits) - expected).abs().max()) < 1e-4


def test_cached_prefixes_of_the_two_kinds_are_never_mixed(plain: LLM) -> None:
    expected = {length: answers(plain, [length])[0] for length in (1000, 1010, 1100, 1090)}
    with load() as llm:
        for length, num_cached in [(1000, 0), (1100, 0), (1010, 992), (1090, 1088), (1000, 992)]:
            [output] = llm.generate({"prompt_token_ids": WORDS[:length]}, greedy(8), use_tqdm=False)
            assert output.metrics.num_cached_tokens == num_cached, length
            assert output.outputs[0].token_ids == expected[length]
        assert llm.engine.stats().num_restarts == 0


def test_going_on_is_asking_again_with_the_answer_so_far(llm: LLM, plain: LLM) -> None:
    [tokens] = answers(llm, [SWITCH - 5], max_tokens=16)
    for count in (3, 5, 6, 7, 12):
        prompt = {"prompt_token_ids": WORDS[: SWITCH - 5] + tokens[:count]}
        [again] = plain.generate(prompt, greedy(16 - count), use_tqdm=False)
        assert again.outputs[0].token_ids == tokens[count:]


TIGHT = {"enable_prefix_caching": False, "kv_cache_memory": 129 * 16 * 1536}
"""129 blocks of 16 tokens: three sequences of 688."""


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 64}, TIGHT], ids=str)
def test_a_batch_in_which_some_cross_the_line_is_one_by_one(plain: LLM, settings: dict[str, Any]) -> None:
    chance = random.Random(1)
    lengths = [686, 687, 688] + [chance.randint(SWITCH - 12, SWITCH + 4) for _ in range(6)] + [40, 1300]
    expected = [answers(plain, [length], max_tokens=12)[0] for length in lengths]
    with load(max_model_len=1400, **settings) as llm:
        assert answers(llm, lengths, max_tokens=12) == expected
        stats = llm.engine.stats()
        assert stats.num_restarts == sum(length <= SWITCH < length + 11 for length in lengths)
        assert (stats.num_preemptions > 0) == (settings is TIGHT)
        assert stats.kv_blocks_used == 0


def test_samples_of_one_request_cross_the_line_each_for_itself(llm: LLM, plain: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=12, ignore_eos=True)
    prompt = {"prompt_token_ids": WORDS[: SWITCH - 4]}
    [given], [expected] = (engine.generate(prompt, params, use_tqdm=False) for engine in (llm, plain))
    texts = [sample.token_ids for sample in given.outputs]
    assert texts == [sample.token_ids for sample in expected.outputs]
    assert texts[0] != texts[1]


def test_a_beam_of_one_is_greedy_across_the_line(llm: LLM) -> None:
    [tokens] = answers(llm, [SWITCH - 4], max_tokens=9)
    prompt = {"prompt_token_ids": WORDS[: SWITCH - 4]}
    [found] = llm.beam_search(prompt, BeamSearchParams(beam_width=1, max_tokens=9, ignore_eos=True))
    assert found.sequences[0].tokens == tokens


def test_a_context_below_the_line_never_restarts() -> None:
    with load(max_model_len=SWITCH) as llm:
        assert len(answers(llm, [SWITCH - 5], max_tokens=16)[0]) == 5
        assert llm.engine.stats().num_restarts == 0
