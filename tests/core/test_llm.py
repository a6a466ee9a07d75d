"""The offline door on the recorded tiny checkpoint: parameters, defaults, streams, failures."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opsin import (
    LLM,
    BatchInterrupted,
    BeamSearchParams,
    PoolingParams,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from opsin.api import ProcessedPrompt
from opsin.engine import runner
from opsin.engine.runner import Runner
from opsin.engine.sampler import sample
from opsin.engine.sequence import Sequence
from opsin.errors import ConfigError, RequestError, RequestsFailed

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = str(GOLDEN / "qwen2vl" / "model")
PICTURE = str(GOLDEN / "images" / "astronaut_96x96.png")
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
        compute, pool = Runner._compute, runner.pool
        sizes: list[int] = []
        failed: list[int] = []

        def noted(self: Runner, result: Any, chunks: Any) -> None:
            sizes.append(len(chunks))
            compute(self, result, chunks)

        def fails_together(sequence: Any, start: int, hidden: Any) -> Any:
            pooled = pool(sequence, start, hidden)
            if sizes[-1] > 1:
                failed.append(sizes[-1])
                raise RuntimeError("a batch that fails")
            return pooled

        monkeypatch.setattr(Runner, "_compute", noted)
        monkeypatch.setattr(runner, "pool", fails_together)
        again = [output.outputs for output in fresh.embed(prompts, use_tqdm=False)]
    assert failed, "some step had both prompts"
    for one, other in zip(expected, again, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one.data, other.data, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Batches lose nothing
# --------------------------------------------------------------------------------------------------

SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPTS = ["one", "two and a half", "three", "four is more", "five"]


def ids_of(outputs: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_iterators_of_prompts_give_what_lists_give(llm: LLM) -> None:
    expected = ids_of(llm.generate(PROMPTS, SHORT, use_tqdm=False))
    assert ids_of(llm.generate((prompt for prompt in PROMPTS), SHORT, use_tqdm=False)) == expected
    assert ids_of(llm.generate(iter(PROMPTS), iter([SHORT] * 5), use_tqdm=False)) == expected
    assert ids_of(llm.generate(dict.fromkeys(PROMPTS).keys(), SHORT, use_tqdm=False)) == expected
    vectors = [
        output.outputs.embedding for output in llm.embed(iter(PROMPTS), use_tqdm=False) if output.outputs
    ]
    assert vectors == [o.outputs.embedding for o in llm.embed(PROMPTS, use_tqdm=False) if o.outputs]
    said = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = ids_of(llm.chat(said, SHORT, use_tqdm=False))
    assert ids_of(llm.chat(iter(said), SHORT, use_tqdm=False)) == answers
    assert ids_of(llm.chat(iter(said[0]), SHORT, use_tqdm=False)) == answers[:1]
    assert llm.generate([], use_tqdm=False) == llm.generate(iter([]), use_tqdm=False) == []
    assert llm.chat(iter([]), use_tqdm=False) == []


def test_iterators_are_read_while_others_are_answered(llm: LLM) -> None:
    read: list[int] = []

    def prompts() -> Iterator[str]:
        for number in range(400):
            read.append(number)
            yield f"prompt {number}"

    found = llm.generate_iter(prompts(), SHORT)
    first = next(found)
    assert len(read) < 400, "not all are read before the first is answered"
    rest = dict([first, *found])
    assert sorted(rest) == list(range(400))
    assert not llm.engine.has_unfinished()
    assert not llm._batches._receivers


@pytest.mark.parametrize(
    "make", [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.int32)]
)
def test_token_ids_in_any_form(llm: LLM, make: Any) -> None:
    one, two = [5, 6, 7], [8, 9, 10]
    expected = ids_of(llm.generate([one, two], SHORT, use_tqdm=False))
    assert ids_of(llm.generate(make(one), SHORT, use_tqdm=False)) == expected[:1]
    assert ids_of(llm.generate([make(one), make(two)], SHORT, use_tqdm=False)) == expected
    assert ids_of(llm.generate(make([one, two]), SHORT, use_tqdm=False)) == expected
    assert ids_of(llm.generate({"prompt_token_ids": make(one)}, SHORT, use_tqdm=False)) == expected[:1]


def test_what_is_no_prompt_is_refused(llm: LLM) -> None:
    for wrong in (np.array([1.5]), b"bytes", [[1.5]], 5, [True, False], torch.ones(3, dtype=torch.bool)):
        with pytest.raises(RequestError, match="expected a text, a list of token ids"):
            llm.generate(wrong, SHORT, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there are parameters for 2 prompts"):
        llm.generate(iter(PROMPTS), [SHORT, SHORT], use_tqdm=False)
    with pytest.raises(ConfigError, match="sampling_params is a int"):
        llm.generate(PROMPTS, 5, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got a str as parameters of prompt 0"):
        llm.generate("a", ["greedy"], use_tqdm=False)  # type: ignore[list-item]
    assert not llm.engine.has_unfinished()


def test_iter_methods_yield_as_completed_with_the_index(llm: LLM) -> None:
    lengths = [9, 3, 6]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    order = [
        (index, len(output.outputs[0].token_ids)) for index, output in llm.generate_iter(["a"] * 3, params)
    ]
    assert order == [(1, 3), (2, 6), (0, 9)]
    asked = [[{"role": "user", "content": "a"}]] * 3
    assert [index for index, _ in llm.chat_iter(asked, params, add_generation_prompt=True)] == [1, 2, 0]
    embedded = {index: output.outputs for index, output in llm.embed_iter(PROMPTS)}
    assert sorted(embedded) == [0, 1, 2, 3, 4]
    failed = dict(llm.generate_iter(["a", {"prompt": MARK}], SHORT))
    assert failed[0].error is None
    assert failed[1].error is not None
    with pytest.raises(ConfigError, match="unknown 'add_generation_promt'"):
        llm.chat_iter(asked, params, add_generation_promt=True)


def test_leaving_an_iteration_early_ends_what_is_left(llm: LLM) -> None:
    found = llm.generate_iter(PROMPTS, SHORT)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_unfinished()
    assert llm.engine.stats().kv_blocks_used == 0
    assert not llm._batches._receivers


def test_calls_within_an_iteration_lose_nothing(llm: LLM) -> None:
    expected = ids_of(llm.generate(PROMPTS, SHORT, use_tqdm=False))

    def beams() -> list[list[int]]:
        [found] = llm.beam_search("two", BeamSearchParams(beam_width=2, max_tokens=3))
        return [beam.tokens for beam in found.sequences]

    best = beams()
    streamed = list(llm.stream("one", SHORT))[-1].outputs
    found: dict[int, list[int]] = {}
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (4, 9, 10, 11, 12)]
    for index, output in llm.generate_iter(PROMPTS, params):
        found[index] = output.outputs[0].token_ids[:4]
        assert ids_of(llm.generate(["three"], SHORT, use_tqdm=False)) == [expected[2]]
        assert beams() == best
        assert list(llm.stream("one", SHORT))[-1].outputs == streamed
    assert [found[index] for index in range(5)] == expected
    bad: Any = {"prompt": MARK}
    found.clear()
    for index, output in llm.generate_iter(["one", bad, "three"], params[:3]):
        found[index] = [] if output.error else output.outputs[0].token_ids[:4]
        list(llm.stream("two", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)))
    assert found == {0: expected[0], 1: [], 2: expected[2]}


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """As in a terminal: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_gives_what_is_finished(llm: LLM) -> None:
    def interrupt(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(ids) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return logits

    params = [SHORT, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True), SHORT]
    params[1].logits_processors = [interrupt]
    with pytest.raises(BatchInterrupted) as caught:
        llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert sorted(caught.value.outputs) == [0, 2]
    assert all(output.finished for output in caught.value.outputs.values())
    assert not llm.engine.has_unfinished()
    assert llm.engine.stats().kv_blocks_used == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(run(llm).outputs[0].token_ids) == 12, "the engine goes on"


def test_a_failed_item_names_its_file_and_raises_why(llm: LLM, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    prompts = ["fine", {"prompt": MARK * 2, "multi_modal_data": {"image": [PICTURE, str(broken)]}}]
    with pytest.raises(RequestsFailed, match=r"request 1: image 2 \('.*broken.png'\): ") as caught:
        llm.generate(prompts, SHORT, use_tqdm=False)
    good, bad = caught.value.outputs
    assert good.outputs[0].finished()
    with pytest.raises(RequestError, match="broken.png"):
        _ = bad.outputs[0].text
    assert list(bad.outputs) == []
    picture = Image.open(PICTURE)
    said = [{"role": "user", "content": [{"type": "image", "image": broken}]}]
    with pytest.raises(RequestError, match=r"messages\[0\].content\[0\] \('.*broken.png'\)"):
        llm.chat(said, SHORT, use_tqdm=False)
    [failed] = llm.embed(
        {"prompt": MARK * 2, "multi_modal_data": {"image": picture}}, use_tqdm=False, on_error="return"
    )
    assert failed.error is not None
    assert failed.outputs is None


@pytest.mark.parametrize("hook", ["map", "expand", "positions"])
def test_a_bug_in_a_plugin_fails_its_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    def bug(*_: Any) -> Any:
        raise KeyError("grid")

    processor = llm.engine.frontend.processor
    if hook == "map":
        monkeypatch.setattr(processor.mappers["image"], "map", bug)
    elif hook == "expand":
        placeholders = {m: replace(p, expand=bug) for m, p in processor.placeholders.items()}
        monkeypatch.setattr(processor, "placeholders", placeholders)
    else:
        positions = processor.model_spec.positions
        assert positions is not None
        spec = replace(
            processor.model_spec,
            positions=lambda config, ids, media: bug() if media else positions(config, ids, media),
        )
        monkeypatch.setattr(processor, "model_spec", spec)
    picture = Image.new("RGB", (61, 35), {"map": "red", "expand": "green", "positions": "blue"}[hook])
    bad = {"prompt": MARK, "multi_modal_data": {"image": picture}}
    good, failed = llm.generate(["fine", bad], SHORT, use_tqdm=False, on_error="return")
    assert good.error is None
    where = "" if hook == "positions" else "image 1: "
    expected = f"{where}{hook}: the plugin of Qwen2VLForConditionalGeneration failed with KeyError: 'grid'"
    assert str(failed.error) == expected


def test_a_model_for_embeddings_gives_no_answers() -> None:
    with LLM(MODEL, dtype="float32", kv_cache_memory=2**20, task="embed") as embedder:
        for call in (embedder.generate, embedder.generate_iter, embedder.stream):
            with pytest.raises(ConfigError, match=r'loaded for embeddings; load it with task="generate"'):
                call("a")
        for ask in (embedder.chat, embedder.chat_iter, embedder.stream_chat):
            with pytest.raises(ConfigError, match="loaded for embeddings"):
                ask(ASK)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="loaded for embeddings"):
            embedder.beam_search("a", BeamSearchParams(2))
        [one, other] = embedder.score("a cat", ["a cat", "a dog"], use_tqdm=False)
        assert one.outputs.score == pytest.approx(1, abs=1e-5)
        assert other.outputs.score < 0.9999
        assert len(embedder.score(["a", "b"], ["c", "d"], use_tqdm=False)) == 2
        with pytest.raises(ConfigError, match="2 and 3 prompts"):
            embedder.score(["a", "b"], ["c", "d", "e"])


# --------------------------------------------------------------------------------------------------
# vLLM's parameters
# --------------------------------------------------------------------------------------------------


def test_allowed_and_bad_tokens(llm: LLM) -> None:
    ids = run(llm).outputs[0].token_ids
    allowed = sorted({*range(40, 60)} - {ids[0]})
    assert set(run(llm, allowed_token_ids=allowed).outputs[0].token_ids) <= set(allowed)
    assert set(run(llm, allowed_token_ids=allowed, temperature=2.0, seed=1).outputs[0].token_ids) <= set(
        allowed
    )
    bare, spaced = (llm.get_tokenizer().encode(word, add_special_tokens=False) for word in ("he", " he"))
    assert len(bare) == len(spaced) == 1
    for [token] in (bare, spaced):
        assert set(run(llm, logit_bias={token: 100}).outputs[0].token_ids) == {token}
        assert token not in run(llm, logit_bias={token: 100}, bad_words=["he"]).outputs[0].token_ids
        with pytest.raises(RequestError, match="leave no token to choose"):
            run(llm, allowed_token_ids=[token], bad_words=["he"])
    with pytest.raises(RequestError, match="allowed_token_ids has token id 100000"):
        run(llm, allowed_token_ids=[100000])


def test_bad_words_of_several_tokens_forbid_the_last_only(llm: LLM) -> None:
    prompt, params = ProcessedPrompt(token_ids=[1, 2, 3]), SamplingParams(temperature=0)

    def best(*generated: int) -> Any:
        sequence = Sequence(0, "a", 0, prompt, params, bad_words=[[4, 5, 6], [7]])
        sequence.token_ids += generated
        [token] = sample(torch.tensor([[0.0, 1, 0, 0, 0, 0, 9, 10]]), [sequence])
        return token

    assert best().token_id == 6
    assert best(4, 5).token_id == 1
    assert best(5).token_id == 6
    assert best(4).token_id == 6


def test_logits_processors(llm: LLM) -> None:
    seen: list[tuple[int, int]] = []

    def only(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((len(prompt), len(output)))
        forced = torch.full_like(logits, float("-inf"))
        forced[70 + len(output)] = 0
        return forced

    params = {"logits_processors": [only], "max_tokens": 3}
    assert run(llm, [5, 6, 7, 8], **params).outputs[0].token_ids == [70, 71, 72]
    assert seen == [(4, 0), (4, 1), (4, 2)]
    twice = run(llm, logits_processors=[lambda ids, logits: -logits, lambda ids, logits: -logits])
    assert twice.outputs[0].token_ids == run(llm).outputs[0].token_ids
    for wrong in (lambda ids, logits: 1 / 0, lambda ids, logits: logits[:3], lambda ids, logits: None):
        good, bad = llm.generate(
            ["a", "b"], [SHORT, replace(SHORT, logits_processors=[wrong])], use_tqdm=False, on_error="return"
        )
        assert good.error is None
        assert "logits_processors: test_logits_processors.<locals>.<lambda> failed" in str(bad.error)


def test_all_logprobs(llm: LLM) -> None:
    output = run(llm, logprobs=-1, prompt_logprobs=-1, max_tokens=2)
    size = llm.engine.info.vocab_size
    assert output.outputs[0].logprobs is not None
    assert [len(entries) for entries in output.outputs[0].logprobs] == [size, size]
    total = sum(math.exp(entry.logprob) for entry in output.outputs[0].logprobs[0].values())
    assert total == pytest.approx(1, abs=1e-4)
    assert output.prompt_logprobs is not None
    assert all(entries is None or len(entries) == size for entries in output.prompt_logprobs)


def test_the_prompts_end_can_be_kept(llm: LLM) -> None:
    ids = list(range(100, 130))
    assert run(llm, ids, truncate_prompt_tokens=5).prompt_token_ids == ids[-5:]
    assert run(llm, ids, truncate_prompt_tokens=-1).prompt_token_ids == ids
    long = list(range(50, 60)) * 1000
    assert len(run(llm, long, truncate_prompt_tokens=-1, max_tokens=1).prompt_token_ids) == 2047
    [embedded] = llm.embed(long, use_tqdm=False, truncate_prompt_tokens=7)
    assert list(embedded.prompt_token_ids) == long[-7:]
    picture = {"multi_modal_data": {"image": Image.open(PICTURE)}}
    whole = run(llm, {"prompt": f"before {MARK} after", **picture})
    cut = run(llm, {"prompt": f"before {MARK} after", **picture}, truncate_prompt_tokens=14)
    assert cut.prompt_token_ids == whole.prompt_token_ids[-14:]
    alone = run(llm, {"prompt": f"{MARK} after", **picture})
    assert cut.prompt_token_ids == alone.prompt_token_ids[-14:]
    with pytest.raises(RequestError, match="would cut off image 1"):
        run(llm, {"prompt": f"before {MARK} after", **picture}, truncate_prompt_tokens=5)


def test_no_text_if_none_is_wanted(llm: LLM) -> None:
    output = run(llm, detokenize=False).outputs[0]
    assert output.text == ""
    assert output.token_ids == run(llm).outputs[0].token_ids


def test_kinds_of_output_of_a_stream(llm: LLM) -> None:
    def stream(kind: RequestOutputKind) -> list[RequestOutput]:
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, output_kind=kind, logprobs=0)
        return list(llm.stream("Hello there", params))

    whole = stream(RequestOutputKind.CUMULATIVE)[-1].outputs[0]
    new = [output.outputs[0] for output in stream(RequestOutputKind.DELTA)]
    assert [len(output.token_ids) for output in new] == [1] * 9
    assert "".join(output.text for output in new) == whole.text
    assert [token for output in new for token in output.token_ids] == whole.token_ids
    assert [entry for output in new for entry in output.logprobs or ()] == whole.logprobs
    [only] = stream(RequestOutputKind.FINAL_ONLY)
    assert only.outputs[0] == whole
    [batch] = llm.generate("Hello there", SamplingParams(output_kind=RequestOutputKind.DELTA, max_tokens=3))
    assert len(batch.outputs[0].token_ids) == 3, "a batch gives all of it"


def test_a_request_keeps_the_parameters_it_came_with(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    found = llm.stream("a", params)
    next(found)
    params.max_tokens = 2
    assert len(list(found)[-1].outputs[0].token_ids) == 5


def test_priorities_are_given_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(
        MODEL, dtype="float32", kv_cache_memory=2**20, max_num_seqs=1, scheduling_policy="priority"
    ) as ranked:
        added: list[tuple[str, int]] = []
        add = ranked.engine.add

        def note(request_id: str, prompt: Any, params: Any) -> None:
            added.append((request_id, params.priority))
            add(request_id, prompt, params)

        monkeypatch.setattr(ranked.engine, "add", note)
        list(ranked.generate_iter(["a", "b"], SHORT, priority=[3, 2]))
        ranked.generate(["a", "b"], SHORT, use_tqdm=False, priority=5)
        ranked.chat(ASK, SHORT, use_tqdm=False, priority=iter([7]))
        assert added == [("0-0", 3), ("0-1", 2), ("1-0", 5), ("1-1", 5), ("2-0", 7)]
    with pytest.raises(ConfigError, match="1 priority for 2 prompts"):
        ranked.generate(["a", "b"], SHORT, priority=[1])


def test_metrics_and_the_prefix_cache(llm: LLM) -> None:
    ids = list(range(200, 264))
    assert llm.reset_prefix_cache()
    assert run(llm, ids).num_cached_tokens == 0
    assert run(llm, ids).num_cached_tokens > 0
    assert llm.reset_prefix_cache()
    assert run(llm, ids).num_cached_tokens == 0
    metrics = {metric.name: metric.value for metric in llm.get_metrics()}
    assert metrics["opsin:prefix_hits"] == llm.engine.stats().prefix_hits
    found = llm.stream(ids, SHORT)
    next(found)
    assert not llm.reset_prefix_cache(), "a request is running"
    list(found)
