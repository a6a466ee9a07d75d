"""Incremental text against text decoded at once, and what a request shows while it grows and when it ends."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from opsin.api import ProcessedPrompt
from opsin.engine.request import RequestState
from opsin.engine.sequence import SampledToken
from opsin.engine.sequence import Sequence as EngineSequence
from opsin.engine.text import Detokenizer, StopStrings
from opsin.errors import RequestError
from opsin.params import SamplingParams
from opsin.results import CompletionOutput, Logprob, RequestOutput

GOLDEN = Path(__file__).parents[1] / "golden"
BYTE_LEVEL, SENTENCEPIECE = "qwen2vl", "llava15"
FAMILIES = [BYTE_LEVEL, SENTENCEPIECE]
TEXT = "Hello 世界! 🎉 naïve café  what's up?\n\tпривет  ก็ได้ 👩‍👩‍👧 <|im_end|> </s>"


@cache
def load(family: str) -> Any:
    return AutoTokenizer.from_pretrained(GOLDEN / family / "model")


def token_ids(family: str, max_size: int = 40) -> st.SearchStrategy[list[int]]:
    """Ids of all kinds, special and beyond the vocabulary; halves of characters often."""
    tokenizer = load(family)
    halves = [i for i in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([i])]
    one = (st.integers(0, len(tokenizer) + 3) | st.sampled_from(halves)).map(lambda token_id: [token_id])
    characters = [tokenizer.encode(char, add_special_tokens=False) for char in "世က🎉ä\n x"]
    parts = st.lists(one | st.sampled_from(characters), max_size=max_size)
    return parts.map(lambda lists: [token_id for ids in lists for token_id in ids])


def pieces_of(tokenizer: Any, prompt: Sequence[int], output: Sequence[int], skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    return [*map(detokenizer.push, output), detokenizer.flush()]


def decode_bytewise(tokenizer: Any, ids: Sequence[int], skip: bool) -> str:
    """Decode a sentencepiece-like vocabulary by hand, bad bytes one by one, good characters kept."""
    specials = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} if skip else set()
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in ids if i < len(tokenizer) and i not in specials]
    text = ""
    for is_byte, group in groupby(tokens, lambda token: token.startswith("<0x")):
        if is_byte:
            raw = bytes(int(token[3:5], 16) for token in group)
            # One mark per bad byte, as tokenizers' ByteFallback has it.
            text += raw.decode("utf-8", "surrogateescape")
        else:
            text += "".join(group).replace("▁", " ")
    text = "".join("\ufffd" if "\udc80" <= char <= "\udcff" else char for char in text)
    return text.removeprefix(" ")


def is_subsequence(part: str, whole: str) -> bool:
    rest = iter(whole)
    return all(char in rest for char in part)


# --------------------------------------------------------------------------------------------------
# Detokenizer
# --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(output=token_ids(BYTE_LEVEL), skip=st.booleans())
@example(output=list(range(95, 195)), skip=True)  # a hundred single bytes: more than is ever held
def test_byte_level_pieces_are_the_whole_text(output: list[int], skip: bool) -> None:
    tokenizer = load(BYTE_LEVEL)
    assert "".join(pieces_of(tokenizer, [], output, skip)) == tokenizer.decode(
        output, skip_special_tokens=skip
    )


@settings(deadline=None, max_examples=300)
@given(output=token_ids(SENTENCEPIECE), skip=st.booleans())
@example(output=[228, 131, 131, 228, 131, 131], skip=True)  # two characters in one run of bytes, no context
def test_sentencepiece_pieces_are_the_whole_text(output: list[int], skip: bool) -> None:
    tokenizer = load(SENTENCEPIECE)
    whole = tokenizer.decode(output, skip_special_tokens=skip)
    by_hand = decode_bytewise(tokenizer, output, skip)
    joined = "".join(pieces_of(tokenizer, [], output, skip))
    if "\ufffd" not in whole:
        assert joined == whole == by_hand
    else:  # one bad byte spoils its good neighbours, but not those that streaming has shown already
        assert is_subsequence(whole.replace("\ufffd", ""), joined.replace("\ufffd", ""))
        assert is_subsequence(joined.replace("\ufffd", ""), by_hand.replace("\ufffd", ""))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip", [True, False])
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_text_after_a_prompt_is_what_the_prompt_lacks(family: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = load(family)
    text = data.draw(st.text(max_size=30) | st.just(TEXT))
    prompt = tokenizer.encode("A picture of" + data.draw(st.sampled_from(["", ":", " 世"])))
    output = tokenizer.encode(text, add_special_tokens=False)
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    after = tokenizer.decode(prompt + output, skip_special_tokens=skip)
    assert before + "".join(pieces_of(tokenizer, prompt, output, skip)) == after


@pytest.mark.parametrize("family", FAMILIES)
def test_no_piece_ends_in_half_a_character(family: str) -> None:
    tokenizer = load(family)
    prompt = tokenizer.encode("Say:")
    output = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = pieces_of(tokenizer, prompt, output, False)
    assert "\ufffd" not in "".join(pieces)
    assert any(not piece for piece in pieces[:-1]), "nothing was ever held back: the text is too simple"
    assert pieces[-1] == ""


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_random_pieces_hold_back_at_most_half_a_character(family: str, data: st.DataObject) -> None:
    tokenizer = load(family)
    detokenizer = Detokenizer(tokenizer, [], True)
    for token_id in data.draw(token_ids(family)):
        detokenizer.push(token_id)
    assert detokenizer.flush() in ("", "\ufffd", "\ufffd" * 2, "\ufffd" * 3)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_may_end_in_half_a_character(family: str) -> None:
    tokenizer = load(family)
    ids = tokenizer.encode("so: 🎉 fine", add_special_tokens=False)
    whole = tokenizer.decode(ids)
    cuts = [i for i in range(1, len(ids)) if tokenizer.decode(ids[:i]).endswith("\ufffd")]
    assert cuts
    for cut in cuts:
        shown = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert shown + "".join(pieces_of(tokenizer, ids[:cut], ids[cut:], False)) == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_half_a_character_at_the_end_is_shown_as_such(family: str) -> None:
    tokenizer = load(family)
    output = tokenizer.encode("🎉", add_special_tokens=False)[:-1]
    pieces = pieces_of(tokenizer, tokenizer.encode("x"), output, True)
    assert pieces[-1].strip("\ufffd") == ""
    assert pieces[-1] != ""


class CountingTokenizer:
    """A tokenizer without a backend that counts what it is asked to decode."""

    def __init__(self, family: str) -> None:
        self._tokenizer = load(family)
        self.longest = 0
        self.calls = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise AssertionError("not needed")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        self.calls += 1
        self.longest = max(self.longest, len(token_ids))
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def convert_tokens_to_ids(self, tokens: str) -> int:
        raise AssertionError("not needed")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["text", "halves", "specials", "unknown", "random"])
def test_work_per_token_is_bounded(family: str, kind: str) -> None:
    tokenizer, counting = load(family), CountingTokenizer(family)
    half = tokenizer.encode("🎉", add_special_tokens=False)[-2]
    output = {
        "text": tokenizer.encode(TEXT, add_special_tokens=False) * 10,
        "halves": [half] * 500,
        "specials": [tokenizer.all_special_ids[0]] * 500,
        "unknown": [len(tokenizer) + 1] * 500,
        "random": random.Random(0).choices(range(len(tokenizer)), k=500),
    }[kind]
    detokenizer = Detokenizer(counting, [], True)
    for token_id in output:
        detokenizer.push(token_id)
    assert counting.longest <= 32
    assert counting.calls <= 3 * len(output)


def test_text_of_a_token_keeps_its_space() -> None:
    tokenizer = load(SENTENCEPIECE)
    token_id = tokenizer.convert_tokens_to_ids("▁w")
    assert tokenizer.decode([token_id]) == "w"
    assert Detokenizer(tokenizer, tokenizer.encode("a"), True).token_text(token_id) == " w"
    assert Detokenizer(tokenizer, [], True).token_text(tokenizer.eos_token_id) == "</s>"


# --------------------------------------------------------------------------------------------------
# Stop strings
# --------------------------------------------------------------------------------------------------

AB = st.text("ab", min_size=1, max_size=5)


@settings(deadline=None)
@given(strings=st.lists(AB, min_size=1, max_size=3), pieces=st.lists(AB, max_size=8))
def test_stop_strings_do_not_depend_on_how_the_text_comes(strings: list[str], pieces: list[str]) -> None:
    stops = StopStrings(strings)

    def run(parts: Sequence[str]) -> tuple[str, str | None]:
        text = shown = ""
        for part in parts:
            num_old = len(text)
            text += part
            found = stops.find(text, num_old)
            if found is not None:
                assert text[: found[0]].startswith(shown), "a part of the stop string was shown"
                return text[: found[0]], found[1]
            now = text[: len(text) - stops.num_pending(text)]
            assert now.startswith(shown)
            shown = now
        return text, None

    whole = "".join(pieces)
    by_char = run(list(whole))
    assert run(pieces) == by_char
    ends = [whole.find(string) + len(string) for string in strings if string in whole]
    if ends:
        kept, string = by_char
        assert len(kept) + len(string or "") == min(ends)
    else:
        assert by_char == (whole, None)


def test_longest_pending_prefix_is_held() -> None:
    stops = StopStrings(["</end>", "<", "end!"])
    assert stops.num_pending("the en") == 2
    assert stops.num_pending("</") == 2
    assert stops.num_pending("done") == 1
    assert stops.num_pending("") == 0
    assert StopStrings(["x"]).num_pending("x") == 0


# --------------------------------------------------------------------------------------------------
# RequestState
# --------------------------------------------------------------------------------------------------

EOS = 561  # any id will do


def make_state(
    *, prompt: str = "Q:", max_len: int = 1000, family: str = BYTE_LEVEL, **settings: Any
) -> RequestState:
    tokenizer = load(family)
    return RequestState(
        request_id="r",
        prompt=ProcessedPrompt(token_ids=tokenizer.encode(prompt), text=prompt),
        params=SamplingParams(**{"max_tokens": 100, **settings}),
        tokenizer=tokenizer,
        eos_token_ids=frozenset({EOS}),
        max_len=max_len,
        arrival_time=1.0,
    )


def feed(state: RequestState, tokens: Sequence[int], index: int = 0) -> list[str]:
    """Append until the sample ends; returns the text shown after each token."""
    shown = []
    for token in tokens:
        reason = state.append(index, SampledToken(token))
        output = state.output().outputs[index]
        assert output.finish_reason == reason
        shown.append(output.text)
        if reason is not None:
            break
    for earlier, later in pairwise(shown):
        assert later.startswith(earlier), "shown text changed"
    return shown


def ids_of(text: str, family: str = BYTE_LEVEL) -> list[int]:
    ids: list[int] = load(family).encode(text, add_special_tokens=False)
    return ids


def result(state: RequestState) -> CompletionOutput:
    return state.output().outputs[0]


@pytest.mark.parametrize("skip", [True, False])
def test_eos_ends_without_text(skip: bool) -> None:
    state = make_state(skip_special_tokens=skip)
    tokens = [*ids_of(" yes"), EOS]
    feed(state, tokens)
    output = result(state)
    assert (output.text, output.token_ids) == (" yes", tokens)
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert state.output().finished


def test_stop_token_ends_without_text_unless_it_is_wanted() -> None:
    *answer, last = ids_of("one two")
    text = load(BYTE_LEVEL).decode(answer)
    for include in (False, True):
        state = make_state(stop_token_ids=[last], include_stop_str_in_output=include)
        feed(state, [*answer, last, 0])
        output = result(state)
        assert output.text == ("one two" if include else text)
        assert output.token_ids == [*answer, last]
        assert (output.finish_reason, output.stop_reason) == ("stop", last)


def test_ignored_eos_goes_on_unless_it_is_a_stop_token() -> None:
    state = make_state(ignore_eos=True, max_tokens=3)
    feed(state, [EOS, EOS, EOS, EOS])
    assert result(state).token_ids == [EOS] * 3
    assert result(state).finish_reason == "length"
    state = make_state(ignore_eos=True, stop_token_ids=[EOS])
    feed(state, [EOS, EOS])
    assert (result(state).token_ids, result(state).stop_reason) == ([EOS], EOS)


@pytest.mark.parametrize(("max_tokens", "max_len", "expected"), [(3, 1000, 3), (None, 6, 4), (50, 6, 4)])
def test_length(max_tokens: int | None, max_len: int, expected: int) -> None:
    state = make_state(max_tokens=max_tokens, max_len=max_len)
    num_prompt = len(state.output().prompt_token_ids)
    feed(state, ids_of("a b c d e f g h"))
    output = result(state)
    assert output.finish_reason == "length"
    assert len(output.token_ids) == (expected if max_len == 1000 else max_len - num_prompt)


def test_eos_at_the_limit_is_a_stop() -> None:
    state = make_state(max_tokens=2)
    feed(state, [*ids_of("a")[:1], EOS])
    assert result(state).finish_reason == "stop"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("include", [False, True])
def test_stop_string(family: str, include: bool) -> None:
    state = make_state(stop=["never", "END"], include_stop_str_in_output=include, family=family)
    shown = feed(state, ids_of("so 世 EN, END. More", family))
    output = result(state)
    assert output.text.lstrip() == ("so 世 EN, END" if include else "so 世 EN, ")
    assert (output.finish_reason, output.stop_reason) == ("stop", "END")
    assert not any(text.endswith(("E", "EN")) for text in shown)
    assert any(text.endswith("EN,") for text in shown), "what turned out harmless was not shown"


def test_stop_string_at_the_limit_beats_it() -> None:
    tokens = ids_of("xENDyyy")
    text = load(BYTE_LEVEL).decode(tokens)
    limit = next(n for n in range(len(tokens)) if "END" in load(BYTE_LEVEL).decode(tokens[:n]))
    state = make_state(stop="END", max_tokens=limit)
    feed(state, tokens)
    assert (result(state).text, result(state).finish_reason) == ("x", "stop")
    assert text.startswith("xEND")


def test_held_part_of_a_stop_string_is_shown_at_the_end() -> None:
    state = make_state(stop="END!", max_tokens=len(ids_of("the END")))
    shown = feed(state, ids_of("the END"))
    assert shown[-1] == "the END"
    assert not shown[-2].endswith("E")


def test_min_tokens_delays_every_stop() -> None:
    x = ids_of("x")[0]
    state = make_state(stop="xx", stop_token_ids=[7], min_tokens=4)
    feed(state, [7, EOS, x, x, x, x])
    output = result(state)
    assert output.token_ids == [7, EOS, x, x, x]
    assert output.stop_reason == "xx"


def test_half_a_character_is_flushed_at_the_end() -> None:
    tokens = ids_of("🎉")
    state = make_state(max_tokens=len(tokens) - 1)
    shown = feed(state, tokens)
    assert set(shown[:-1]) == {""}
    assert shown[-1] == "\ufffd"
    assert result(state).token_ids == tokens[:-1]


def test_special_tokens_in_the_text() -> None:
    tokens = [*ids_of("a"), load(BYTE_LEVEL).convert_tokens_to_ids("<|box_start|>"), *ids_of("b")]
    for skip, text in ((True, "ab"), (False, "a<|box_start|>b")):
        state = make_state(skip_special_tokens=skip, max_tokens=3)
        feed(state, tokens)
        assert result(state).text == text


def test_logprobs_name_the_chosen_first() -> None:
    state = make_state(logprobs=2)
    a, b, c = ids_of("a")[0], ids_of("b")[0], ids_of("c")[0]
    state.append(0, SampledToken(a, -2.5, ((b, -0.5), (c, -1.0)), 7))
    state.append(0, SampledToken(b, -0.25, ((b, -0.25), (c, -3.0)), 1))
    output = result(state)
    assert output.cumulative_logprob == -2.75
    assert output.logprobs == [
        {a: Logprob(-2.5, 7, "a"), b: Logprob(-0.5, 1, "b"), c: Logprob(-1.0, 2, "c")},
        {b: Logprob(-0.25, 1, "b"), c: Logprob(-3.0, 2, "c")},
    ]
    assert list(output.logprobs[0]) == [a, b, c]
    assert result(make_state()).logprobs is None
    assert result(make_state()).cumulative_logprob is None


def test_prompt_logprobs_begin_with_none() -> None:
    state = make_state(prompt="a b", prompt_logprobs=1)
    prompt = state.output().prompt_token_ids
    assert state.output().prompt_logprobs is None
    state.describe_prompt(1, [SampledToken(token, -1.0, ((token, -1.0),), 1) for token in prompt[1:]])
    first, *others = state.output().prompt_logprobs or []
    assert first is None
    assert [list(entry or {}) for entry in others] == [[token] for token in prompt[1:]]


def test_snapshots_do_not_change_later() -> None:
    state = make_state(logprobs=0)
    tokens = ids_of("a b c")
    snapshots = []
    for token in tokens:
        state.append(0, SampledToken(token, -1.0, (), 1))
        snapshots.append(state.output())
    growing = list(range(1, len(tokens) + 1))
    assert [len(s.outputs[0].token_ids) for s in snapshots] == growing
    assert [len(s.outputs[0].logprobs or []) for s in snapshots] == growing
    assert snapshots[0].outputs[0].text == load(BYTE_LEVEL).decode(tokens[:1])


def test_samples_end_one_by_one() -> None:
    state = make_state(n=2, max_tokens=2)
    a = ids_of("a")[0]
    assert state.append(1, SampledToken(a)) is None
    assert state.append(1, SampledToken(a)) == "length"
    assert not state.output().finished
    assert state.append(0, SampledToken(EOS)) == "stop"
    output = state.output()
    assert output.finished
    assert [(o.index, o.text, o.finish_reason) for o in output.outputs] == [
        (0, "", "stop"),
        (1, "aa", "length"),
    ]


def test_abort_keeps_what_is_there() -> None:
    state = make_state(n=2, stop="END")
    feed(state, [*ids_of("the E")])
    state.append(1, SampledToken(EOS))
    state.stop()
    output = state.output()
    assert output.finished
    assert [(o.text, o.finish_reason) for o in output.outputs] == [("the E", "abort"), ("", "stop")]


def test_failure() -> None:
    state = make_state(n=2)
    state.append(0, SampledToken(EOS))
    error = RequestError("no")
    state.stop(error)
    output = state.output()
    assert output.finished
    assert output.error is error
    assert [o.finish_reason for o in output.outputs] == ["stop", "error"]


def test_metrics_and_prompt() -> None:
    state = make_state(prompt="Q:", max_tokens=1)
    sequence = EngineSequence(seq_id=0, request_id="r", index=0, prompt=state.prompt, params=state.params)
    sequence.num_cached, sequence.num_preemptions = 16, 1
    state.computed(sequence, 2.0)
    sequence.num_cached = 32  # of a later admission
    state.computed(sequence, 3.0)
    before: RequestOutput = state.output()
    assert before.metrics is not None
    assert (before.metrics.first_token_time, before.metrics.finished_time) == (None, None)
    feed(state, ids_of("a"))
    after = state.output()
    assert after.metrics is not None
    assert after.metrics.first_token_time is not None
    assert after.metrics.finished_time is not None
    assert replace(after.metrics, first_token_time=None, finished_time=None) == before.metrics
    assert (before.metrics.arrival_time, before.metrics.first_scheduled_time) == (1.0, 2.0)
    assert (before.metrics.num_cached_tokens, before.metrics.num_preemptions) == (16, 1)
    assert (after.request_id, after.prompt, after.prompt_token_ids) == ("r", "Q:", ids_of("Q:"))
