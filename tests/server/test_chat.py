"""Chat completions through OpenAI's client, on a real socket."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from PIL import Image
from pydantic import BaseModel

from opsin import LLM, BeamSearchParams, SamplingParams
from opsin.inputs.chat import ChatOptions
from opsin.inputs.prompt import Prompt
from tests.server.asset_server import AssetServer, asset_server
from tests.server.in_thread import MODEL, Running
from tests.server.messages import CAT, COFFEE, IMAGES, data_url, image, text, user


def rendered(llm: LLM, messages: Any) -> Prompt:
    frontend = llm.engine.frontend
    return frontend.renderer.render(frontend.conversation(messages), ChatOptions())


HELLO = user("Hello")
PICTURES = user(text("First"), image(data_url(CAT)), text("then"), image(data_url(COFFEE)), text("?"))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The offline door: what the server has to say, too."""
    with LLM(MODEL, dtype="float32", kv_cache_memory=2**22) as loaded:
        yield loaded


@pytest.fixture
def assets() -> Iterator[AssetServer]:
    with asset_server() as started:
        yield started


def ask(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    """One answer, greedy and short unless said otherwise."""
    body = {"temperature": 0, "max_tokens": 12, **options}
    known = {"temperature", "max_tokens", "n", "logprobs", "top_logprobs", "tools", "tool_choice", "stop"}
    known |= {"response_format", "stream", "stream_options", "seed", "parallel_tool_calls", "logit_bias"}
    extra = {name: body.pop(name) for name in list(body) if name not in known}
    return client.chat.completions.create(model="golden", messages=messages, extra_body=extra or None, **body)


def streamed(client: openai.OpenAI, messages: Any, **options: Any) -> list[Any]:
    return list(ask(client, messages, stream=True, **options))


def test_answer_is_that_of_the_offline_door(client: openai.OpenAI, llm: LLM) -> None:
    for messages in (HELLO, PICTURES):
        answer = ask(client, messages)
        [expected] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
        choice = answer.choices[0]
        assert choice.message.content == expected.outputs[0].text
        assert choice.message.role == "assistant"
        assert choice.finish_reason == "length"
        assert answer.usage.prompt_tokens == len(expected.prompt_token_ids), "pictures expanded"
        assert answer.usage.completion_tokens == 12
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
        assert answer.object == "chat.completion"
        assert answer.model == "golden"
        assert answer.id.startswith("chatcmpl-")


@pytest.mark.parametrize("messages", [HELLO, PICTURES], ids=["text", "pictures"])
@pytest.mark.parametrize("options", [{}, {"stop": ["l"]}, {"n": 2}], ids=["plain", "stop", "n"])
def test_streamed_is_not_streamed(client: openai.OpenAI, messages: Any, options: Any) -> None:
    whole = ask(client, messages, max_tokens=24, **options)
    chunks = streamed(client, messages, max_tokens=24, **options)
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert all(c.delta.role is None for c in own[1:])
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        reasons = [c.finish_reason for c in own if c.finish_reason is not None]
        assert reasons == [choice.finish_reason], "exactly once"
        assert own[-1].finish_reason is not None, "in the last chunk"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_of_a_stream(client: openai.OpenAI) -> None:
    whole = ask(client, PICTURES)
    chunks = streamed(client, PICTURES, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    chunks = streamed(
        client, PICTURES, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_a_stream_is_server_sent_events(server: Running) -> None:
    body = {"messages": HELLO, "stream": True, "max_tokens": 3}
    response = server.post("/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no", "nginx would hold the pieces back"
    assert response.headers["cache-control"] == "no-cache"
    events = response.text.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    parsed = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all("finish_reason" in event["choices"][0] for event in parsed)
    assert all("usage" not in event for event in parsed)


def test_pictures_by_every_way_are_the_same(
    client: openai.OpenAI, server: Running, assets: AssetServer
) -> None:
    expected = ask(client, user(image(data_url(CAT)), text("?")))
    by_http = assets.put("/cat.png", (IMAGES / CAT).read_bytes())
    for part in (
        image(by_http),
        {"type": "input_image", "image_url": by_http},
        {"type": "image", "image": data_url(CAT)},
        {"type": "image_url", "image_url": {"url": data_url(CAT), "detail": "high"}},
        image(data_url(CAT).replace("data:image/png;", "data:text/plain;charset=utf-8;name=a.txt;")),
    ):
        assert ask(client, user(part, text("?"))).choices == expected.choices
    before = server.engine.stats().num_encoded
    ask(client, user(image(by_http), text("And what else?")))
    assert server.engine.stats().num_encoded == before, "known by its content"


def test_video_as_frames_and_as_a_file(client: openai.OpenAI, assets: AssetServer) -> None:
    names = [f"video_{number}_112x84.png" for number in range(4)]
    frames = [Image.open(IMAGES / name) for name in names]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    url = assets.put("/video.png", file.getvalue())
    by_frames = ask(client, user({"type": "video", "video": [data_url(name) for name in names]}, text("?")))
    by_file = ask(client, user({"type": "video_url", "video_url": {"url": url}}, text("?")))
    assert by_frames.choices == by_file.choices
    assert by_frames.usage.prompt_tokens == by_file.usage.prompt_tokens
    alone = ask(client, user(text("?")))
    assert by_frames.usage.prompt_tokens > alone.usage.prompt_tokens


def test_several_samples(client: openai.OpenAI) -> None:
    options = {"n": 3, "temperature": 1.5, "top_p": 1, "top_k": 0, "seed": 7, "max_tokens": 20}
    answer = ask(client, HELLO, **options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer.usage.completion_tokens <= 60
    again = ask(client, HELLO, **options)
    assert [choice.message.content for choice in again.choices] == texts, "the seed makes it so"
    other = ask(client, HELLO, **{**options, "seed": -(2**63)})
    assert [choice.message.content for choice in other.choices] != texts


def test_best_of_gives_the_most_probable(client: openai.OpenAI) -> None:
    sampled = {"temperature": 1.5, "top_p": 1, "top_k": 0, "seed": 3, "ignore_eos": True}
    four = ask(client, HELLO, n=4, logprobs=True, **sampled)
    sums = {c.message.content: sum(t.logprob for t in c.logprobs.content) for c in four.choices}
    best = ask(client, HELLO, n=1, best_of=4, **sampled)
    assert [choice.message.content for choice in best.choices] == [max(sums, key=lambda text: sums[text])]
    assert best.choices[0].index == 0


def test_beam_search(client: openai.OpenAI, llm: LLM) -> None:
    answer = ask(client, PICTURES, n=2, use_beam_search=True, max_tokens=6)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 2
    prompt = rendered(llm, PICTURES)
    [expected] = llm.beam_search([prompt], BeamSearchParams(beam_width=2, max_tokens=6))
    assert texts == [sequence.text for sequence in expected.sequences]


def test_beam_search_tells_log_probabilities(client: openai.OpenAI, llm: LLM) -> None:
    asked = {"n": 2, "use_beam_search": True, "max_tokens": 6}
    answer = ask(client, PICTURES, **asked, logprobs=True, top_logprobs=3)
    prompt = rendered(llm, PICTURES)
    [expected] = llm.beam_search([prompt], BeamSearchParams(beam_width=2, max_tokens=6))
    for choice, sequence in zip(answer.choices, expected.sequences, strict=True):
        told = [entry.logprob for entry in choice.logprobs.content]
        assert len(told) == len(sequence.tokens)
        assert sum(told) == pytest.approx(sequence.cum_logprob, abs=1e-3)
        assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)
    assert all(choice.logprobs is None for choice in ask(client, PICTURES, **asked).choices)


def test_logprobs(client: openai.OpenAI) -> None:
    answer = ask(client, HELLO, logprobs=True, top_logprobs=3, max_tokens=5)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 5
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob, "greedy takes the best"
        assert entry.bytes == list(entry.token.encode())
    chunks = streamed(client, HELLO, logprobs=True, top_logprobs=3, max_tokens=5)
    in_pieces = [
        entry
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content
    ]
    assert in_pieces == entries
    without = ask(client, HELLO, max_tokens=5)
    assert without.choices[0].logprobs is None
    none = ask(client, HELLO, logprobs=True, max_tokens=5)
    assert none.choices[0].logprobs.content[0].top_logprobs == []


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = ask(client, HELLO, prompt_logprobs=1, max_tokens=1)
    entries = answer.prompt_logprobs
    assert len(entries) == answer.usage.prompt_tokens
    assert entries[0] is None
    assert all(entry and all("logprob" in place for place in entry.values()) for entry in entries[1:])


def test_stop_and_what_ended_it(client: openai.OpenAI) -> None:
    whole = ask(client, HELLO, max_tokens=30).choices[0].message.content
    stop = whole[10:12]
    answer = ask(client, HELLO, max_tokens=30, stop=[stop, "never"]).choices[0]
    assert answer.message.content == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.stop_reason == stop
    kept = ask(client, HELLO, max_tokens=30, stop=stop, include_stop_str_in_output=True).choices[0]
    assert kept.message.content == whole[: whole.index(stop)] + stop


def test_bias_forbids_a_token(client: openai.OpenAI, server: Running) -> None:
    first = ask(client, HELLO, max_tokens=1, logprobs=True).choices[0].logprobs.content[0]
    biased = ask(client, HELLO, max_tokens=1, logit_bias={"5": 100}, logprobs=True).choices[0]
    assert biased.logprobs.content[0].token != first.token
    assert biased.message.content == server.post("/detokenize", {"tokens": [5]}).json()["prompt"]


def test_length_of_an_answer(server: Running) -> None:
    body = {"messages": user("\n0" * 990), "temperature": 0, "ignore_eos": True}
    limited = server.post("/v1/chat/completions", {**body, "max_completion_tokens": 7}).json()
    assert limited["usage"]["completion_tokens"] == 7
    to_the_end = server.post("/v1/chat/completions", body).json()
    assert to_the_end["usage"]["total_tokens"] == 2048, "the context"
    assert to_the_end["usage"]["completion_tokens"] < 100
    assert to_the_end["choices"][0]["finish_reason"] == "length"


def test_continuing_and_echoing(client: openai.OpenAI) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The answer is"}]
    options = {"continue_final_message": True, "max_tokens": 8}
    continued = ask(client, messages, **options).choices[0].message.content
    echoed = ask(client, messages, echo=True, **options).choices[0].message.content
    assert echoed == "The answer is" + continued
    chunks = streamed(client, messages, echo=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == echoed
    assert ask(client, HELLO, echo=True).choices == ask(client, HELLO).choices, (
        "the last message is the user's"
    )


def test_template_variables_reach_the_template(client: openai.OpenAI) -> None:
    plain = ask(client, PICTURES)
    numbered = ask(client, PICTURES, chat_template_kwargs={"add_vision_id": True})
    assert numbered.usage.prompt_tokens > plain.usage.prompt_tokens


def test_image_options_change_the_picture(client: openai.OpenAI) -> None:
    plain = ask(client, PICTURES)
    small = ask(client, PICTURES, mm_processor_kwargs={"max_pixels": 28 * 28 * 4})
    assert small.usage.prompt_tokens < plain.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="max_pixel"):
        ask(client, PICTURES, mm_processor_kwargs={"max_pixel": 5})


def test_salt_keeps_prefixes_apart(client: openai.OpenAI) -> None:
    words = user("A prompt of its own, long enough for several blocks of the prefix cache to be filled")

    def cached(**options: Any) -> int:
        return ask(client, words, max_tokens=1, **options).usage.prompt_tokens_details.cached_tokens

    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="a") > 0
    assert cached(cache_salt="b") == 0


# --------------------------------------------------------------------------------------------------
# Constrained answers
# --------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "many": {"type": "boolean"}},
    "required": ["colour", "many"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


def test_json_schema_with_pictures(client: openai.OpenAI) -> None:
    answer = ask(client, PICTURES, response_format=FORMAT, max_tokens=100)
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"colour", "many"}
    assert found["colour"] in ("red", "blue")
    assert answer.choices[0].finish_reason == "stop"
    chunks = streamed(client, PICTURES, response_format=FORMAT, max_tokens=100)
    joined = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert joined == answer.choices[0].message.content


def test_constraints_beside_each_other(client: openai.OpenAI) -> None:
    """Constrained and free answers in one batch: none changes the other."""
    wanted = [{}, {"response_format": FORMAT}, {"guided_choice": ["yes", "no"]}, {"guided_regex": "[0-9]{3}"}]
    alone = [ask(client, PICTURES, max_tokens=60, **options).choices for options in wanted]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(ask, client, PICTURES, max_tokens=60, **options) for options in wanted * 2]
        together = [job.result().choices for job in jobs]
    assert together == alone * 2
    assert alone[2][0].message.content in ("yes", "no")
    assert alone[3][0].message.content.isdigit()


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ({"structured_outputs": {"choice": ["north", "south"]}}, r"north|south"),
        ({"structured_outputs": {"regex": "a+b"}}, r"a+b"),
        ({"structured_outputs": {"grammar": 'start: "x" "y"'}}, r"xy"),
        ({"guided_grammar": 'start: "p" | "q"'}, r"p|q"),
        ({"guided_json": {"enum": [1, 2]}}, r"[12]"),
        ({"guided_json": '{"const": "k"}'}, r'"k"'),
        ({"response_format": {"type": "json_object"}, "max_tokens": 4}, r"\{.*"),
    ],
)
def test_forms_of_constraints(client: openai.OpenAI, constraint: Any, expected: str) -> None:
    content = ask(client, HELLO, **{"max_tokens": 40, **constraint}).choices[0].message.content
    assert re.fullmatch(expected, content, re.DOTALL)


def test_parsing_helper_of_the_client(client: openai.OpenAI) -> None:
    """``client.chat.completions.parse`` sends a schema made from a class."""

    class Answer(BaseModel):
        colour: Literal["red", "green"]

    found = client.chat.completions.parse(
        model="golden", messages=HELLO, response_format=Answer, max_tokens=60, temperature=0
    )
    assert found.choices[0].message.parsed.colour in ("red", "green")


# --------------------------------------------------------------------------------------------------
# Tools
# --------------------------------------------------------------------------------------------------


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": schema}}


TOOLS = [
    tool("get_weather", city={"enum": ["Paris", "Rome"]}),
    tool("count", number={"type": "boolean"}),
]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "count"}}, "stop")],
    ids=["required", "named"],
)
def test_calls_are_grammar(client: openai.OpenAI, choice: Any, reason: str) -> None:
    options = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 120}
    answer = ask(client, PICTURES, **options).choices[0]
    [call] = answer.message.tool_calls
    assert answer.message.content is None
    assert answer.finish_reason == reason
    assert call.type == "function"
    assert call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "count" or choice != "required":
        assert call.function.name == "count"
        assert type(arguments["number"]) is bool
    else:
        assert arguments["city"] in ("Paris", "Rome")

    chunks = streamed(client, PICTURES, **options)
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or ()]
    assert [d.function.name for d in deltas if d.id is not None] == [call.function.name]
    assert "".join(d.function.arguments for d in deltas) == call.function.arguments
    assert {d.index for d in deltas} == {0}
    assert len(deltas) > 3, "the arguments come in pieces"
    assert [c.choices[0].finish_reason for c in chunks][-1] == reason
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ""


def test_none_and_auto_leave_the_answer_free(client: openai.OpenAI) -> None:
    plain = ask(client, HELLO)
    none = ask(client, HELLO, tools=TOOLS, tool_choice="none")
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    auto = ask(client, HELLO, tools=TOOLS)
    assert auto.usage.prompt_tokens > plain.usage.prompt_tokens, "the model is told of the tools"
    assert auto.choices[0].message.tool_calls is None
    joined = "".join(c.choices[0].delta.content or "" for c in streamed(client, HELLO, tools=TOOLS))
    assert joined == auto.choices[0].message.content


def test_auto_finds_a_call_in_the_answer(client: openai.OpenAI) -> None:
    """A grammar makes the random model write what a trained one would."""
    grammar = (
        r'start: "Well. <tool_call>\n{\"name\": \"count\", \"arguments\": {\"number\": true}}\n</tool_call>"'
    )
    options = {"tools": TOOLS, "tool_choice": "auto", "guided_grammar": grammar, "max_tokens": 200}
    answer = ask(client, HELLO, **options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "Well."
    [call] = answer.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("count", '{"number": true}')
    chunks = streamed(client, HELLO, **options)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Well."
    assert "<tool_call>" not in str(chunks)


def test_conversation_with_results(server: Running) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "count", "arguments": '{"number": true}'},
    }
    messages = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call, {**call, "id": "call_2"}],
            "refusal": None,
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "three"},
        {"role": "tool", "tool_call_id": "call_2", "content": [text("four")]},
    ]
    tokens = server.post("/tokenize", {"messages": messages, "tools": TOOLS}).json()["tokens"]
    prompt = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions")
    assert '<tools>\n{"type": "function", "function": {"name": "get_weather",' in prompt
    written = '<tool_call>\n{"name": "count", "arguments": {"number": true}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{written}\n{written}<|im_end|>" in prompt
    assert prompt.endswith(
        "<|im_start|>user\n<tool_response>\nthree\n</tool_response>\n<tool_response>\nfour\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_tokens_in_messages_are_text_unless_they_are_allowed(client: openai.OpenAI, llm: LLM) -> None:
    said = user(text("What is <|im_end|>, <|image_pad|>?"), image(data_url(CAT)))
    answer = ask(client, said)
    [offline] = llm.chat(said, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert answer.choices[0].message.content == offline.outputs[0].text
    assert answer.usage.prompt_tokens == len(offline.prompt_token_ids)
    with pytest.raises(openai.BadRequestError, match="2 image placeholder"):
        ask(client, said, allow_special_tokens=True)
    marked = user(text("a<|im_end|>b"))
    assert (
        ask(client, marked, allow_special_tokens=True).usage.prompt_tokens
        < ask(client, marked).usage.prompt_tokens
    )


def test_allowed_tokens_and_bad_words(client: openai.OpenAI, llm: LLM) -> None:
    allowed = {"allowed_token_ids": list(range(40, 50))}
    params = SamplingParams(temperature=0, max_tokens=12, **allowed)
    [offline] = llm.chat(HELLO, params, use_tqdm=False)
    assert ask(client, HELLO, **allowed).choices[0].message.content == offline.outputs[0].text
    [token] = llm.get_tokenizer().encode("he", add_special_tokens=False)
    forced = {"logit_bias": {str(token): 100}, "ignore_eos": True}
    assert ask(client, HELLO, **forced).choices[0].message.content == "he" * 12
    assert "he" not in ask(client, HELLO, bad_words=["he"], **forced).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="allowed_token_ids: a token id is out of vocabulary"):
        ask(client, HELLO, allowed_token_ids=[10**6])
