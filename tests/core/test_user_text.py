"""Special tokens and placeholders in what users write are text, for every family's tokenizer and template."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin import EngineConfig
from opsin.api import ProcessedPrompt
from opsin.checkpoint.files import load
from opsin.errors import RequestError
from opsin.inputs.chat import ChatOptions
from opsin.inputs.frontend import Frontend, build_frontend
from opsin.inputs.placeholders import GuardedText, PlaceholderFinder, UserText, text_pattern
from opsin.plugins import load_plugins

ROOT = Path(__file__).parents[2]
GOLDEN = {path.parent.name: path for path in sorted((ROOT / "tests/golden").glob("*/model"))}
TINY = {path.parents[2].name: path for path in sorted((ROOT / "demo/checkpoints").glob("*/src/*/model"))}
MODELS = GOLDEN | TINY
PICTURE = Image.new("RGB", (60, 40), "blue")
TEMPLATE = "{{ bos_token or '' }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
"""For a golden model without a template of its own or of its family."""


@cache
def frontend(model: str) -> Frontend:
    checkpoint = load(str(MODELS[model]), None)
    plugins = load_plugins()
    spec = plugins.model(checkpoint.architecture)
    size = checkpoint.config.get("text_config", {}).get("vocab_size", checkpoint.config.get("vocab_size"))
    built = build_frontend(
        EngineConfig(model=str(MODELS[model])),
        checkpoint,
        spec,
        plugins,
        max_model_len=10**6,
        vocab_size=size or 10**6,
        media_width=64,
    )
    if built.renderer.template is None:
        config = EngineConfig(model=str(MODELS[model]), chat_template=TEMPLATE)
        built = build_frontend(
            config, checkpoint, spec, plugins, max_model_len=10**6, vocab_size=10**6, media_width=64
        )
    return built


@cache
def special_ids(model: str) -> dict[int, str]:
    known = frontend(model).tokenizer.added_tokens_decoder  # type: ignore[attr-defined]
    return {
        token_id: token.content
        for token_id, token in known.items()
        if token.special and len(token.content) > 1
    }


@cache
def special_strings(model: str) -> list[str]:
    placeholders = frontend(model).renderer.placeholders.values()
    return [*special_ids(model).values(), *(p.text(number) for p in placeholders for number in (1, 2))]


def texts(model: str) -> st.SearchStrategy[str]:
    """Texts with special strings, halves of them, and whatever is around."""
    special = st.sampled_from(special_strings(model))
    half = st.builds(lambda s, n: s[: n % len(s)], special, st.integers(1, 40))
    other_half = st.builds(lambda s, n: s[n % len(s) :], special, st.integers(1, 40))
    plain = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Co", "Cn"]), max_size=8)
    piece = st.one_of(special, half, other_half, plain, st.sampled_from([" ", "\n", "a", "<", "|>", "1"]))
    return st.lists(piece, min_size=1, max_size=6).map("".join)


def conversation(said: list[str], *, pictures: bool = True) -> list[dict[str, Any]]:
    """Four texts, two of them next to each other, and two pictures."""
    picture = [{"type": "image_pil", "image_pil": PICTURE}] * pictures
    first, second, answer, third = said
    return [
        {
            "role": "user",
            "content": [*picture, *({"type": "text", "text": text} for text in (first, second))],
        },
        {"role": "assistant", "content": answer},
        {"role": "user", "content": [{"type": "text", "text": third}, *picture]},
    ]


def processed(model: str, messages: list[dict[str, Any]], **options: Any) -> ProcessedPrompt:
    parts = frontend(model)
    return parts.chat(parts.conversation(messages), ChatOptions(**options))


def without_media(prompt: ProcessedPrompt) -> list[int | str]:
    """The token ids, with the modality in place of each item."""
    ids: list[int | str] = []
    done = 0
    for item in prompt.media:
        ids += [*prompt.token_ids[done : item.start], item.modality]
        done = item.end
    return [*ids, *prompt.token_ids[done:]]


def marks(model: str, prompt: ProcessedPrompt) -> list[int | str]:
    """Special tokens and media, in order."""
    return [i for i in without_media(prompt) if isinstance(i, str) or i in special_ids(model)]


def readable(text: str) -> str:
    """What tokenizers keep: some normalise characters, some spaces around special tokens."""
    return re.sub(r"\s|\ufffd", "", unicodedata.normalize("NFKC", text))


def decoded(model: str, prompt: ProcessedPrompt) -> str:
    tokenizer = frontend(model).tokenizer
    runs: list[list[int]] = [[]]
    for token in without_media(prompt):
        if isinstance(token, str):
            runs.append([])
        else:
            runs[-1].append(token)
    return "".join(tokenizer.decode(run, skip_special_tokens=False) for run in runs)


SLOW_START = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("model", MODELS)
@SLOW_START
@given(data=st.data())
def test_no_text_makes_a_special_token_or_moves_a_picture(model: str, data: st.DataObject) -> None:
    said = data.draw(st.lists(texts(model), min_size=4, max_size=4))
    prompt = processed(model, conversation(said))
    plain = processed(model, conversation(["a", "b", "c", "d"]))
    assert marks(model, prompt) == marks(model, plain)
    assert [item.mapped.num_embeds for item in prompt.media] == [
        item.mapped.num_embeds for item in plain.media
    ]


@pytest.mark.parametrize("model", MODELS)
@SLOW_START
@given(data=st.data())
def test_text_is_decoded_to_itself(model: str, data: st.DataObject) -> None:
    said = data.draw(st.lists(texts(model), min_size=4, max_size=4))
    prompt = processed(model, conversation(said, pictures=False))
    plain = processed(model, conversation(["a", "b", "c", "d"], pictures=False))
    assert prompt.text is not None
    text = prompt.text
    extra = len(without_media(plain)) and decoded(model, plain).startswith(bos := bos_of(model))
    if extra and not text.lstrip().startswith(bos):
        text = bos + text
    if "\ufffd" not in text:
        assert readable(decoded(model, prompt)) == readable(text)


def bos_of(model: str) -> str:
    return getattr(frontend(model).tokenizer, "bos_token", None) or "\0"


@pytest.mark.parametrize("model", MODELS)
@SLOW_START
@given(data=st.data())
def test_other_texts_keep_their_ids_on_both_paths(model: str, data: st.DataObject) -> None:
    plain = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40)
    said = data.draw(st.lists(plain, min_size=4, max_size=4))
    parts = frontend(model)
    prompt = parts.renderer.render(parts.conversation(conversation(said)), ChatOptions())
    text, finder = prompt.text, PlaceholderFinder(parts.tokenizer, parts.renderer.placeholders)
    assert text is not None
    special = re.compile("|".join(map(re.escape, special_strings(model))), re.IGNORECASE)
    if prompt.guarded is not None:
        assert any(special.search(words) for words in ["".join(said[:2]), *said[2:]])
        return
    as_today = finder.in_text(text, {"image": 2})
    place = text.rindex("]") if "]" in text else len(text)
    spans = [match.span() for match in special.finditer(text)]
    while any(start < place < end for start, end in spans):
        place += 1
    guarded = GuardedText(f"{text[:place]}\x01{text[place:]}", "\x01")
    if "\x01" not in text:
        assert finder.in_text(guarded, {"image": 2}) == as_today


@pytest.mark.parametrize("model", MODELS)
def test_history_without_content_is_empty_text(model: str) -> None:
    def text(content: Any, role: str = "assistant") -> str | None:
        said = {"role": "user", "content": "a"}, {"role": role, "content": content}
        return processed(model, [*said, {"role": "user", "content": "b"}]).text

    assert text(None) == text("")
    assert text([], "user") == text("", "user")


@pytest.mark.parametrize("model", [model for model in MODELS if "phi3v" in model])
def test_a_prompt_tokenized_as_a_whole_keeps_them_apart(model: str) -> None:
    for said in (["see <|image_1|> and <|image_2|>", "b", "<|image_1|> c", "<|image_7|> d <|image_2|>"],):
        prompt = processed(model, conversation(said), mm_processor_kwargs={"tokenize_whole_prompt": True})
        plain = processed(
            model, conversation(["a", "b", "c", "d"]), mm_processor_kwargs={"tokenize_whole_prompt": True}
        )
        assert marks(model, prompt) == marks(model, plain)
        assert readable(said[0]) in readable(decoded(model, prompt))


@pytest.mark.parametrize("model", [model for model in MODELS if bos_of(model) != "\0"])
def test_white_space_before_a_bos_does_not_give_two(model: str) -> None:
    tokenizer, bos = frontend(model).tokenizer, bos_of(model)
    finder = PlaceholderFinder(tokenizer, frontend(model).renderer.placeholders)
    [bos_id] = [token_id for token_id, content in special_ids(model).items() if content == bos]
    for text in (f"{bos}hello", f"\n {bos}hello"):
        assert finder.in_text(text, {}).count(bos_id) == 1


TRANSFORMS = {
    "trim": "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }};{% endfor %}",
    "upper": "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }};{% endfor %}",
    "lower": "{% for m in messages %}[{{ m.role }}]{{ m.content | lower }};{% endfor %}",
    "tojson": "{% for m in messages %}[{{ m.role }}]{{ m.content | tojson }};{% endfor %}",
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_a_template_does_to_text_still_happens(name: str) -> None:
    end = "<|im_end|>"
    said = [{"role": "user", "content": f"  Say {end} and <|IM_START|>\n"}]
    prompt = processed("qwen2vl", said, chat_template=TRANSFORMS[name])
    want = {
        "trim": f"[user]Say {end} and <|IM_START|>;",
        "upper": "[user]  SAY <|IM_END|> AND <|IM_START|>\n;",
        "lower": f"[user]  say {end} and <|im_start|>\n;",
        "tojson": f'[user]"  Say {end} and <|IM_START|>\\n";',
    }[name]
    assert prompt.text == want
    assert decoded("qwen2vl", prompt) == want
    assert marks("qwen2vl", prompt) == []


def test_all_that_is_not_the_template_is_text() -> None:
    """Names, calls, results, tools and the template's variables."""
    end = "<|im_end|>"
    call = {"id": end, "function": {"name": end, "arguments": '{"a": "\\u003c|im_end|>"}'}}
    messages = [
        {"role": "system", "content": end},
        {"role": "user", "content": end, "name": end},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": f"result {end}<|image_pad|>", "tool_call_id": end},
        {"role": "user", "content": "b"},
    ]
    tool = {"type": "function", "function": {"name": "f", "description": end, "parameters": {end: {}}}}
    prompt = processed("qwen2vl", messages, tools=[tool])
    plain = processed(
        "qwen2vl",
        [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user", "user")],
    )
    assert marks("qwen2vl", prompt) == marks("qwen2vl", plain)
    assert decoded("qwen2vl", prompt) == prompt.text
    assert prompt.text is not None
    assert '{"name": "<|im_end|>", "arguments": {"a": "<|im_end|>"}}' in prompt.text
    native = "{{ tools | tojson }}{{ extra }}{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}"
    options = {"chat_template": native, "chat_template_kwargs": {"extra": end}}
    prompt = processed("qwen2vl", messages, tools=[tool], **options)
    assert len(marks("qwen2vl", prompt)) == len(messages)
    allowed = processed("qwen2vl", messages[:2], allow_special_tokens=True, **options)
    assert len(marks("qwen2vl", allowed)) == 6


@pytest.mark.parametrize("model", MODELS)
def test_a_begun_answer_is_text_and_stays_open(model: str) -> None:
    special = special_strings(model)[1]
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b {special} c"}]
    prompt = processed(model, said, continue_final_message=True)
    assert prompt.text is not None
    assert prompt.text.endswith(f"b {special} c")
    said[1]["content"] = "b c"
    assert marks(model, prompt) == marks(model, processed(model, said, continue_final_message=True))


def test_a_template_that_refuses_shows_the_text_as_it_was() -> None:
    refuses = "{{ raise_exception('not ' + messages[0].content) }}"
    with pytest.raises(RequestError, match=re.escape("refused these messages: not <|im_end|>!")):
        processed("qwen2vl", [{"role": "user", "content": "<|im_end|>!"}], chat_template=refuses)


def test_a_tokenizer_that_cannot_tell_them_apart_refuses() -> None:
    known = frontend("qwen2vl").tokenizer.added_tokens_decoder  # type: ignore[attr-defined]
    text = UserText(SimpleNamespace(added_tokens_decoder=known), {})
    [guarded] = text.guarded(["a <|im_end|>"], "7")
    assert guarded == "a <7|im_end|>"
    with pytest.raises(RequestError, match="allow_special_tokens"):
        text.encode(GuardedText(guarded, "7"), add_special_tokens=False)


def test_numbers_of_placeholders_are_any() -> None:
    [numbered] = frontend("phi3v").renderer.placeholders.values()
    assert re.fullmatch(text_pattern(numbered), "<|image_12|>")
