"""`opsin.inputs.conversation`: one type, one table of parts; the server's models agree with it."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from opsin.errors import RequestError
from opsin.inputs.conversation import PART_TYPES, Conversation, MediaPart
from opsin.server.schema import chat as schema

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": "data:,a"}},
            {"type": "text", "text": "What is it?"},
            {"type": "video", "video": ["f1", "f2"]},
        ],
        "name": None,
    },
    {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]},
    {"role": "user", "content": [{"type": "input_image", "image_url": "data:,b"}, "and this?"]},
]


def test_messages_become_text_and_media_parts() -> None:
    conversation = Conversation.parse(MESSAGES)
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant", "user"]
    assert conversation.messages[1].text == "What is it?"
    assert conversation.messages[1].fields == {"role": "user"}
    assert conversation.messages[2].parts == ()
    assert conversation.counts == {"image": 2, "video": 1}
    assert [part.where for part in conversation.media] == [
        "messages[1].content[0]",
        "messages[1].content[2]",
        "messages[3].content[0]",
    ]


def test_values_are_replaced_in_order_and_nothing_else() -> None:
    conversation = Conversation.parse(MESSAGES)
    changed = conversation.with_values([b"1", b"2", b"3"])
    assert [part.value for part in changed.media] == [b"1", b"2", b"3"]
    assert changed.with_values([part.value for part in conversation.media]) == conversation
    assert [part.value for part in conversation.media] == ["data:,a", ["f1", "f2"], "data:,b"]


@pytest.mark.parametrize("call", ["look", {}, {"function": "look"}, {"function": {"name": 3}}])
def test_malformed_tool_calls_are_named(call: object) -> None:
    with pytest.raises(RequestError, match=r"messages\[0\]\.tool_calls\[0\]: expected"):
        Conversation.parse([{"role": "assistant", "tool_calls": [call]}])


def test_the_servers_parts_are_those_of_the_table() -> None:
    """What the server's models let through, the conversation takes, with the same modality."""
    union = get_args(schema.Part)[0]
    models = {
        kind: model for model in get_args(union) for kind in get_args(model.model_fields["type"].annotation)
    }
    assert set(models) == set(PART_TYPES) - {"image_pil"}, "pictures in memory do not come over HTTP"
    for kind, model in models.items():
        part_type = PART_TYPES[kind]
        value = {"url": "data:,x"} if part_type.form == "url" else "x"
        sent = model.model_validate({"type": kind, part_type.key: value}).model_dump(exclude_none=True)
        [part] = Conversation.parse([{"role": "user", "content": [sent]}]).messages[0].parts
        if part_type.modality is None:
            assert part == "x"
        else:
            assert isinstance(part, MediaPart)
            assert replace(part, value=None, where="") == MediaPart(
                "", part_type.modality, None, part_type.is_embeds
            )


def test_a_video_may_say_its_rate_and_no_part_a_size() -> None:
    video = {"type": "video", "video": ["f1", "f2"], "fps": 2}
    [part] = Conversation.parse([{"role": "user", "content": [video]}]).media
    assert part.value == (["f1", "f2"], {"fps": 2})
    with pytest.raises(
        RequestError, match=r"content\[0\].max_pixels: a part has no size of its own; mm_proc"
    ):
        Conversation.parse([{"role": "user", "content": [{**video, "max_pixels": 9}]}])
