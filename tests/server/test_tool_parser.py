"""Tool calls out of text: whatever the pieces it comes in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.api.hermes import HermesTools
from opsin.server.answers.tools import deltas, parse_answer

FORM = HermesTools()

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "}<\\"", "b": [1, {"c": null}]}}\n</tool_call>'
ARGUMENTS = '{"a": "}<\\"", "b": [1, {"c": null}]}'


def calls(text: str, **options: int) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in parse_answer(FORM, text, **options)[1]]


def content(text: str) -> str:
    return parse_answer(FORM, text)[0]


def test_a_call() -> None:
    assert calls(CALL) == [("f", ARGUMENTS)]
    assert content(CALL) == ""
    [call] = parse_answer(FORM, CALL)[1]
    assert call.id.startswith("call_")
    assert json.loads(call.function.arguments) == {"a": '}<"', "b": [1, {"c": None}]}


def test_text_around_calls() -> None:
    text = f"First.\n\n{CALL}\n{CALL}\n\nLast.  "
    assert calls(text) == [("f", ARGUMENTS)] * 2
    assert content(text) == "First.Last.  "


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"arguments": {"a": 1}, "name": "g"}', ("g", '{"a": 1}')),
        ('{"name": "g"}', ("g", "{}")),
        ('{"name": "g", "parameters": {"a": 1}}', ("g", '{"a": 1}')),
        ('{"name": "g", "arguments": "{\\"a\\": 1}"}', ("g", '{"a": 1}')),
        ('{"name":"g","arguments":{}}', ("g", "{}")),
        ('{"name": "g\\u0041", "arguments": {}}', ("gA", "{}")),
    ],
)
def test_other_ways_to_write_it(body: str, expected: tuple[str, str]) -> None:
    assert calls(f"<tool_call>{body}</tool_call>") == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "  spaces stay \n",
        "<tool_call",
        "a < b and <tool_calls>",
        "<tool_call>no JSON</tool_call>",
        "<tool_call>\n[1]\n</tool_call> and on",
        '<tool_call>{"name": 5}</tool_call>',
        '<tool_call>{"name": "unfinished", "argu',
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert parse_answer(FORM, text) == (text, [])


def test_unfinished_calls() -> None:
    """As far as they got: the finish reason tells that they were cut."""
    assert calls('<tool_call>{"name": "f", "arguments": {"a": 1, "b"') == [("f", '{"a": 1, "b"')]
    assert calls('<tool_call>{"name": "f", "arguments": {"a": 1}}') == [("f", '{"a": 1}')]
    assert calls('<tool_call>{"arguments": {}, "name": "f"}') == [("f", "{}")]
    broken = '<tool_call>{"name": "f", "arguments": {"a": </tool_call>' + CALL
    assert calls(broken) == [("f", '{"a": '), ("f", ARGUMENTS)]


def test_calls_beyond_the_limit_are_dropped() -> None:
    assert calls(CALL * 3, most=1) == [("f", ARGUMENTS)]


PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool_", "call>", CALL, CALL[:30], ARGUMENTS, '{"name": "f"}'),
        *("\n", " ", "text", "<", "{", "}", '"', "\\", "é", '{"name": "g", "arguments": '),
    ]
)


@given(st.lists(PIECES, max_size=12).map("".join), st.data())
def test_pieces_make_no_difference(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    parser = FORM.parser()
    found = ""
    names: list[str] = []
    arguments: list[str] = []
    pieces = [parser.push(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)])]
    for piece in [*pieces, parser.flush()]:
        found += piece.content
        for delta in piece.calls:
            if delta.name is not None:
                assert delta.index == len(names)
                names.append(delta.name)
                arguments.append("")
            arguments[delta.index] += delta.arguments
    whole, whole_calls = parse_answer(FORM, text)
    assert found == whole
    assert list(zip(names, arguments)) == [(c.function.name, c.function.arguments) for c in whole_calls]


def test_a_chunk_has_one_entry_a_call() -> None:
    """Clients that add up by position, not by index, would lose pieces otherwise."""
    parser = FORM.parser(None)
    sent = deltas(parser.push(f"{CALL}\n{CALL}"))
    assert [(entry.index, entry.function.name) for entry in sent] == [(0, "f"), (1, "f")]
    assert [entry.function.arguments for entry in sent] == [ARGUMENTS, ARGUMENTS]


@given(data=st.data())
def test_however_it_is_cut_a_chunk_names_no_call_twice(data: st.DataObject) -> None:
    text, parser, whole = f"{CALL}\n{CALL}", FORM.parser(None), {0: "", 1: ""}
    while text:
        size = data.draw(st.integers(1, len(text)))
        piece, text = text[:size], text[size:]
        sent = deltas(parser.push(piece))
        assert len({entry.index for entry in sent}) == len(sent)
        for entry in sent:
            whole[entry.index] += entry.function.arguments
    assert whole == {0: ARGUMENTS, 1: ARGUMENTS}
