"""The offline door on the recorded tiny checkpoint: parameters, defaults, streams, failures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from opsin import LLM, BeamSearchParams, PoolingParams, RequestOutput, SamplingParams
from opsin.engine.runner import Runner
from opsin.errors import ConfigError, RequestError, RequestsFailed

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = str(GOLDEN / "qwen2vl" / "model")
MARK = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, dtype="float32", kv_cache_memory=2**24, seed=3) as loaded:
        yield loaded


def run(llm: LLM, prompt: Any = "Hello there", **params: Any) -> RequestOutput:
    params = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params}
    return llm.generate(prompt, SamplingParams(**params), use_tqdm=False)[0]


def test_defaults_come_from_the_generation_config(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p, params.top_k) == (0.01, 0.001, 1)
    assert params.greedy


def test_eos_of_the_checkpoint_ends_a_request(llm: LLM) -> None:
    plain = run(llm).outputs[0].token_ids
    eos = llm.engine.checkpoint.eos_token_ids[0]
    biased = run(llm, logit_bias={eos: 100}, ignore_eos=False)
    assert biased.outputs[0].token_ids == [eos]
    assert (biased.outputs[0].finish_reason, biased.outputs[0].stop_reason) == ("stop", None)
    held = run(llm, logit_bias={eos: 100}, ignore_eos=False, min_tokens=5).outputs[0].token_ids
    assert held[:5] == plain[:5]
    assert held[5:] == [eos]


def test_stop_token_and_stop_string(llm: LLM) -> None:
    ids = run(llm).outputs[0].token_ids
    stopped = run(llm, stop_token_ids=[ids[4]]).outputs[0]
    assert stopped.token_ids == ids[: ids.index(ids[4]) + 1]
    assert stopped.stop_reason == ids[4]
    text = run(llm).outputs[0].text
    word = text[5:8]
    cut = run(llm, stop=word).outputs[0]
    assert cut.text == text[: text.index(word)]
    assert cut.stop_reason == word
    kept = run(llm, stop=[word], include_stop_str_in_output=True).outputs[0]
    assert kept.text == text[: text.index(word)] + word


def test_length_ends_at_max_tokens_and_at_the_context(llm: LLM) -> None:
    assert run(llm, max_tokens=3).outputs[0].finish_reason == "length"
    with LLM(MODEL, dtype="float32", max_model_len=40, kv_cache_memory=2**20) as short:
        ids = [5] * 30
        output = run(short, ids, max_tokens=None)
        assert len(output.outputs[0].token_ids) == 10
        assert output.outputs[0].finish_reason == "length"
        with pytest.raises(RequestError, match="40"):
            run(short, [5] * 40)


def test_n_samples_share_the_prompt_and_differ(llm: LLM) -> None:
    before = llm.engine.stats()
    output = run(llm, list(range(100, 200)), n=4, temperature=1.5, seed=1)
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4
    assert llm.engine.stats().prefix_hits - before.prefix_hits == 3 * 6, "computed once, found three times"


def test_seed_of_the_engine_makes_runs_repeatable() -> None:
    def sample() -> list[int]:
        with LLM(MODEL, dtype="float32", kv_cache_memory=2**20, seed=11) as fresh:
            return run(fresh, temperature=1.5).outputs[0].token_ids

    assert sample() == sample()


def test_penalties_and_bias_act(llm: LLM) -> None:
    ids = run(llm, max_tokens=40).outputs[0].token_ids
    assert len(set(ids)) < len(ids), "the tiny model repeats itself"
    assert len(set(run(llm, max_tokens=40, frequency_penalty=2.0).outputs[0].token_ids)) > len(set(ids))
    assert len(set(run(llm, max_tokens=40, repetition_penalty=5.0).outputs[0].token_ids)) > len(set(ids))
    assert run(llm, logit_bias={ids[0]: -100}).outputs[0].token_ids[0] != ids[0]


def test_logprobs_are_those_of_the_model(llm: LLM) -> None:
    output = run(llm, logprobs=3, max_tokens=4)
    sample = output.outputs[0]
    assert sample.logprobs is not None
    assert len(sample.logprobs) == 4
    for token, entries in zip(sample.token_ids, sample.logprobs):
        assert len(entries) == 3
        assert entries[token].rank == 1
        assert next(iter(entries.values())).logprob == max(entry.logprob for entry in entries.values())
        assert entries[token].decoded_token is not None
    expected = sum(entries[token].logprob for token, entries in zip(sample.token_ids, sample.logprobs))
    assert sample.cumulative_logprob == pytest.approx(expected)


def test_prompt_logprobs_in_chunks_are_whole() -> None:
    def ask(chunk: int) -> list[float]:
        with LLM(MODEL, dtype="float32", kv_cache_memory=2**20, max_num_batched_tokens=chunk) as fresh:
            output = run(fresh, list(range(50, 90)), prompt_logprobs=2)
            assert output.prompt_logprobs is not None
            assert len(output.prompt_logprobs) == 40
            assert all(len(entry) in (2, 3) for entry in output.prompt_logprobs[1:] if entry)
            pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:])
            return [entry[token].logprob for token, entry in pairs if entry]

    assert torch.allclose(torch.tensor(ask(2048)), torch.tensor(ask(7)), atol=1e-5)


def test_streams_concatenate_to_the_whole(llm: LLM) -> None:
    whole = run(llm, max_tokens=30).outputs[0].text
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    texts = [output.outputs[0].text for output in llm.stream("Hello there", params)]
    assert len(texts) == 30
    assert texts[-1] == whole
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_leaving_a_stream_early_leaves_nothing_behind(llm: LLM) -> None:
    for _ in llm.stream("Hello there", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)):
        break
    assert not llm.engine.has_unfinished()
    assert llm.engine.stats().kv_blocks_used == 0


def test_chat_takes_one_conversation_or_many(llm: LLM) -> None:
    picture = Image.open(GOLDEN / "images" / "astronaut_96x96.png")
    parts = [{"type": "image_pil", "image_pil": picture}, {"type": "text", "text": "Who is it?"}]
    conversation = [{"role": "user", "content": parts}]
    params = SamplingParams(temperature=0, max_tokens=6)
    [one] = llm.chat(conversation, params, use_tqdm=False)
    two = llm.chat([conversation, [{"role": "user", "content": "Hi"}]], params, use_tqdm=False)
    assert two[0].outputs[0].token_ids == one.outputs[0].token_ids
    assert one.prompt is not None
    assert MARK in one.prompt


def test_beams_are_sorted_and_differ(llm: LLM) -> None:
    [found] = llm.beam_search("Hello there", BeamSearchParams(beam_width=4, max_tokens=5))
    scores = [beam.cum_logprob for beam in found.sequences]
    assert len(found.sequences) == 4
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(beam.tokens) for beam in found.sequences}) == 4


def test_one_bad_prompt_raises_its_own_error_many_give_all_results(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    with pytest.raises(RequestError, match="placeholder|image"):
        llm.generate({"prompt": MARK}, params, use_tqdm=False)
    with pytest.raises(RequestsFailed) as caught:
        llm.generate(["fine", {"prompt": MARK}, "fine too"], params, use_tqdm=False)
    finished = [output.error is None for output in caught.value.outputs]
    assert finished == [True, False, True]


def test_settings_and_parameters_are_checked(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="gpu_memory_utilisation"):
        LLM(MODEL, gpu_memory_utilisation=0.9)
    with pytest.raises(ConfigError, match="2 sampling_params for 1 prompt"):
        llm.generate("a", [SamplingParams(), SamplingParams()], use_tqdm=False)
    with pytest.raises(ConfigError, match="2048"):
        LLM(MODEL, max_model_len=100_000)
    with pytest.raises(ConfigError, match="top_p"):
        SamplingParams(top_p=0)


def test_bfloat16_runs_and_mostly_agrees(llm: LLM) -> None:
    with LLM(MODEL, dtype="bfloat16", kv_cache_memory=2**22) as half:
        first = run(half, logprobs=5, max_tokens=1).outputs[0]
    exact = run(llm, logprobs=5, max_tokens=1).outputs[0]
    assert first.logprobs is not None
    assert exact.logprobs is not None
    shared = set(first.logprobs[0]) & set(exact.logprobs[0])
    assert shared
    for token in shared:
        assert first.logprobs[0][token].logprob == pytest.approx(exact.logprobs[0][token].logprob, abs=0.15)


def test_embeddings_are_pooled_hidden_states(llm: LLM) -> None:
    prompts = ["Hello there", "a much longer prompt about a cup of coffee on a table", "Hello there"]
    whole = [output.outputs for output in llm.embed(prompts, use_tqdm=False)]
    assert all(output is not None and len(output.embedding) == 64 for output in whole)
    vectors = torch.stack([output.data for output in whole if output is not None])
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(3))
    assert torch.equal(vectors[0], vectors[2])
    short = llm.embed(prompts[0], PoolingParams(dimensions=16), use_tqdm=False)[0].outputs
    assert short is not None
    assert torch.allclose(short.data, torch.nn.functional.normalize(vectors[0][:16], dim=0), atol=1e-5)
    with pytest.raises(RequestError, match="65"):
        llm.embed(prompts[0], PoolingParams(dimensions=65), use_tqdm=False)
    assert llm.engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_embeddings_in_chunks_are_whole(pooling: Any) -> None:
    prompt = list(range(40, 90))

    def embed(chunk: int) -> torch.Tensor:
        settings: dict[str, Any] = {"pooling_type": pooling, "normalize": False, "kv_cache_memory": 2**20}
        with LLM(MODEL, dtype="float32", max_num_batched_tokens=chunk, **settings) as fresh:
            first, second = (fresh.embed(prompt, use_tqdm=False)[0].outputs for _ in range(2))
            assert first is not None
            assert second is not None
            assert torch.allclose(first.data, second.data, atol=1e-5)
            return second.data

    assert torch.allclose(embed(2048), embed(7), atol=1e-5)


ASK = [{"role": "user", "content": "How many?"}]
TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("method", ["chat", "stream_chat"])
def test_a_misspelt_parameter_is_refused_before_anything_runs(llm: LLM, method: str) -> None:
    before = llm.engine.stats()
    with pytest.raises(
        ConfigError, match=r"unknown 'continue_final_mesage' \(did you mean 'continue_final_me"
    ):
        getattr(llm, method)(ASK, continue_final_mesage=True)
    with pytest.raises(ConfigError, match="unknown 'fetch'"):
        getattr(llm, method)(ASK, fetch=lambda url: b"")
    assert llm.engine.stats() == before


def test_tools_are_told_as_the_server_tells_them(llm: LLM) -> None:
    called = [
        *ASK,
        {"role": "assistant", "tool_calls": [{"function": {"name": "count", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "three"},
    ]
    params = SamplingParams(temperature=0, max_tokens=1)
    [output] = llm.chat(called, params, use_tqdm=False, tools=[TOOL])
    text = llm.get_tokenizer().decode(output.prompt_token_ids)
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
    assert '<tool_call>\n{"name": "count", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text
    assert "<|im_start|>user\n<tool_response>\nthree\n</tool_response><|im_end|>" in text
    with pytest.raises(RequestError, match="tools: got"):
        llm.chat(ASK, params, use_tqdm=False, tools=[{"name": "count"}])
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestError, match="template has no tools"):
        llm.chat(ASK, params, use_tqdm=False, tools=[TOOL], chat_template=plain)
    native = "{% for t in tools %}{{ t.function.name }};{% endfor %}"
    [output] = llm.chat(ASK, params, use_tqdm=False, tools=[TOOL], chat_template=native)
    assert llm.get_tokenizer().decode(output.prompt_token_ids) == "count;"


def test_the_last_message_can_be_left_open_without_saying_it_twice(llm: LLM) -> None:
    begun = [*ASK, {"role": "assistant", "content": "There are"}]
    [output] = llm.chat(
        begun, SamplingParams(temperature=0, max_tokens=1), False, continue_final_message=True
    )
    assert llm.get_tokenizer().decode(output.prompt_token_ids).endswith("<|im_start|>assistant\nThere are")
    with pytest.raises(RequestError, match="set only one"):
        llm.chat(begun, continue_final_message=True, add_generation_prompt=True)


def test_a_step_that_is_tried_again_adds_nothing_to_a_mean_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [list(range(40, 90)), list(range(60, 110))]
    settings: dict[str, Any] = {
        "pooling_type": "mean",
        "max_num_batched_tokens": 16,
        "kv_cache_memory": 2**20,
    }
    with LLM(MODEL, dtype="float32", **settings) as fresh:
        expected = [output.outputs for output in fresh.embed(prompts, use_tqdm=False)]
        sample = Runner._sample
        failed: list[int] = []

        def fails_together(self: Runner, placed: Any, hidden: Any, result: Any) -> None:
            if len(placed) > 1:
                failed.append(len(placed))
                raise RuntimeError("a batch that fails")
            sample(self, placed, hidden, result)

        monkeypatch.setattr(Runner, "_sample", fails_together)
        again = [output.outputs for output in fresh.embed(prompts, use_tqdm=False)]
    assert failed, "some step had both prompts"
    for one, other in zip(expected, again, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one.data, other.data, atol=1e-5)
