"""`opsin.inputs.chat`: messages become the prompt, media in their places; malformed ones are named."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from opsin.api import Expansion, InputContext, MappedMedia, MediaItem, ModelSpec, Placeholder
from opsin.checkpoint.files import Checkpoint
from opsin.config import EngineConfig
from opsin.errors import ConfigError, MediaError, RequestError
from opsin.inputs.chat import ChatOptions, ChatRenderer
from opsin.inputs.conversation import Conversation
from opsin.inputs.frontend import _chat_template
from opsin.inputs.processor import PromptProcessor
from opsin.inputs.prompt import Prompt
from opsin.inputs.template import ChatTemplate, resolve_chat_template
from opsin_models_qwen2vl import plugin as qwen2vl

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = GOLDEN / "qwen2vl" / "model"
CASES = [
    case
    for path in sorted((GOLDEN / "qwen2vl" / "cases").glob("*/case.json"))
    if "messages" in (case := json.loads(path.read_text()))
]
TOKENIZER: Any = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
PICTURE = GOLDEN / "images" / "astronaut_96x96.png"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
DATA_URL = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()


def expand(mapped: MappedMedia, number: int) -> Expansion:
    raise AssertionError("rendering never expands")


FIXED = {m: Placeholder(text=lambda n, m=m: f"<{m}>", expand=expand) for m in ("image", "video")}
NUMBERED = {"image": Placeholder(text=lambda n: f"<|image_{n}|>", expand=expand)}

STRING_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
PARTS_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<{{ part.type }}>{% endif %}"
    "{% endfor %}{% endfor %}"
)


def renderer(template: str | None = STRING_TEMPLATE, **settings: Any) -> ChatRenderer:
    arguments = {"tokenizer": TOKENIZER, "placeholders": FIXED, "local_files": True, **settings}
    return ChatRenderer(template=ChatTemplate(template, TOKENIZER) if template else None, **arguments)


def render(chat: ChatRenderer, messages: Any, **options: Any) -> Prompt:
    conversation = Conversation.parse(messages)
    chat.check(conversation)
    return chat.render(conversation, ChatOptions(**options))


def user(*parts: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def image(value: Any = PICTURE) -> dict[str, Any]:
    return {"type": "image", "image": value}


# --- recorded cases -------------------------------------------------------------------------------


def with_media(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The case's messages, its files put into the parts."""
    images, videos = iter(case["images"]), iter(case["videos"])
    messages: list[dict[str, Any]] = json.loads(json.dumps(case["messages"]))
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image":
                part["image"] = GOLDEN / "images" / next(images)
            elif part["type"] == "video":
                part["video"] = [GOLDEN / "images" / name for name in next(videos)]
    return messages


def qwen2vl_inputs() -> tuple[ChatRenderer, PromptProcessor]:
    config = json.loads((MODEL / "config.json").read_text())
    context = InputContext(
        config=config,
        preprocessor=json.loads((MODEL / "preprocessor_config.json").read_text()),
        tokenizer=TOKENIZER,
    )
    placeholders = {s.modality: s.build(context) for s in qwen2vl.opsin_register_placeholders()}
    processor = PromptProcessor(
        model_spec=qwen2vl.opsin_register_models()[0],
        mappers={s.modality: s.build(context) for s in qwen2vl.opsin_register_input_mappers()},
        placeholders=placeholders,
        tokenizer=TOKENIZER,
        config=config,
        max_model_len=2048,
        vocab_size=config["vocab_size"],
        media_width=config["hidden_size"],
    )
    template = json.loads((MODEL / "chat_template.json").read_text())["chat_template"]
    return renderer(template, placeholders=placeholders), processor


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_recorded_messages_become_the_recorded_prompt_and_ids(case: dict[str, Any]) -> None:
    chat, processor = qwen2vl_inputs()
    prompt = render(chat, with_media(case))
    if case["case"].startswith("embed"):
        prompt = replace(
            prompt, text=f"{prompt.text}<|endoftext|>"
        )  # the embedding model's own template adds it
    assert prompt.text == case["prompt"]
    result = processor.process(prompt)
    assert list(result.token_ids) == case["prompt_token_ids"]
    assert result.positions is not None
    assert result.positions.delta == case["mrope_position_delta"]
    counts = {"image": case["num_image_tokens"], "video": case["num_video_tokens"]}
    for modality, expected in counts.items():
        assert [m.mapped.num_embeds for m in result.media if m.modality == modality] == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_the_plugins_own_template_renders_as_the_checkpoints(case: dict[str, Any]) -> None:
    own = render(renderer(qwen2vl.CHAT_TEMPLATE), with_media(case)).text
    assert own == case["prompt"].removesuffix("<|endoftext|>")


def test_a_placeholder_in_a_text_is_text() -> None:
    chat, processor = qwen2vl_inputs()
    text = "What is <|image_pad|> here?<|im_end|>"
    result = processor.process(render(chat, [user(image(), text)]))
    assert [item.modality for item in result.media] == ["image"]
    assert result.text is not None
    assert f"{text}<|im_end|>" in result.text
    end = result.media[0].end
    assert TOKENIZER.decode(result.token_ids[end:]).startswith(f"<|vision_end|>{text}<|im_end|>")
    assert list(result.token_ids).count(TOKENIZER.convert_tokens_to_ids("<|im_end|>")) == 2
    with pytest.raises(RequestError, match=r"2 image placeholder\(s\) for 1 image item"):
        processor.process(render(chat, [user(image(), text)], allow_special_tokens=True))


# --- placing media --------------------------------------------------------------------------------


def test_placeholders_are_written_where_the_parts_stand() -> None:
    messages = [
        user(image(), "one", image(), "two"),
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": ["three", image()]},
    ]
    fixed = render(renderer(), messages)
    assert fixed.text == "[user]<image>\none\n<image>\ntwo[assistant]yes[user]three\n<image>"
    numbered = render(renderer(placeholders=NUMBERED), messages).text
    assert re.findall(r"\d", numbered) == ["1", "2", "3"]
    parts = render(renderer(PARTS_TEMPLATE), messages).text
    assert parts == "[user]<image>one<image>two[assistant]yes[user]three<image>"
    assert len(fixed.media["image"]) == 3


def test_a_modality_that_a_template_passes_over_is_written_for_it() -> None:
    """A template from before videos: it names pictures, and would leave a video out without a word."""
    older = (
        "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% elif part.type == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
    )
    frames = {"type": "video", "video": [np.zeros((2, 2, 3), np.uint8)]}
    prompt = render(renderer(older), [user("See ", frames, " and ", image(), "!")])
    assert prompt.text == "See <video> and <image>!"
    assert {kind: len(items) for kind, items in prompt.media.items()} == {"video": 1, "image": 1}
    newer = older.replace("{% endif %}", "{% elif part.type == 'video' %}[film]{% endif %}")
    assert render(renderer(newer), [user("See ", frames)]).text == "See [film]"


@pytest.mark.parametrize("template", [STRING_TEMPLATE, PARTS_TEMPLATE])
def test_placeholders_the_user_wrote_are_not_doubled(template: str) -> None:
    messages = [user(image(), "what is <image>?")]
    prompt = render(renderer(template), messages, allow_special_tokens=True)
    assert prompt.text == "[user]what is <image>?"
    assert len(prompt.media["image"]) == 1


def test_numbered_placeholders_the_user_wrote_keep_their_numbers() -> None:
    chat = renderer(placeholders=NUMBERED)
    messages = [user(image(), "a"), user(image(), image(), "b <|image_3|>")]
    text = render(chat, messages, allow_special_tokens=True).text
    assert text == "[user]<|image_1|>\na[user]<|image_2|>\nb <|image_3|>"


@pytest.mark.parametrize(
    "message",
    [
        user("look: <image>"),
        user(image(), image(), "<image>"),
        user(image(), "<image> <image>"),
    ],
)
def test_a_guess_which_item_a_placeholder_means_is_never_made(message: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="write none"):
        render(renderer(), [user(image(), "fine"), message], allow_special_tokens=True)


@pytest.mark.parametrize("text", ["<|image_2|>", "<|image_1|><|image_1|>"])
def test_a_numbered_placeholder_must_belong_to_its_message(text: str) -> None:
    chat = renderer(placeholders=NUMBERED)
    with pytest.raises(RequestError, match="write none"):
        render(chat, [user(image(), text), user(image())], allow_special_tokens=True)


# --- parts ----------------------------------------------------------------------------------------


def test_every_spelling_of_a_picture_is_the_same_picture() -> None:
    with Image.open(PICTURE) as opened:
        parts = [
            {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "high"}},
            {"type": "image_url", "image_url": {"url": PICTURE.as_uri()}},
            {"type": "input_image", "image_url": DATA_URL},
            {"type": "image_pil", "image_pil": opened},
            image(opened),
            image(str(PICTURE)),
            image(np.asarray(opened)),
        ]
        items = [source.decode() for source in render(renderer(), [user(*parts)]).media["image"]]
    assert len(items) == len(parts)
    assert len({item.digest for item in items}) == 1


def test_videos_and_embeddings_are_parts_too() -> None:
    frames = [GOLDEN / "images" / f"video_{index}_112x84.png" for index in range(3)]
    rows = torch.rand(1, 2, 4)
    gif = Path(PICTURE).read_bytes()  # one frame is a video as well
    video_url = {"type": "video_url", "video_url": {"url": "data:;base64," + base64.b64encode(gif).decode()}}
    message = user(
        {"type": "video", "video": frames},
        video_url,
        {"type": "image_embeds", "image_embeds": rows},
        {"type": "video_embeds", "video_embeds": {"rows": rows}},
        {"type": "input_text", "text": "?"},
    )
    prompt = render(renderer(), [message])
    assert prompt.text == "[user]<video>\n<video>\n<image>\n<video>\n?"
    videos = prompt.media["video"]
    assert [video.decode().pixels.shape for video in videos[:2]] == [(3, 84, 112, 3), (1, 96, 96, 3)]
    assert videos[2] == {"rows": rows}
    assert prompt.media["image"][0] is rows


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages is empty"),
        ("hello", "messages is a str"),
        (["hello"], "messages[0] is a str"),
        ([{"role": "king", "content": "x"}], "messages[0].role is 'king'; expected one of system,"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0] has no content"),
        ([{"role": "user", "content": 3}], "messages[0].content is a int"),
        ([user("a"), user(["b"])], "messages[1].content[0] is a list"),
        ([user({"type": "imge", "image": 1})], "(did you mean 'image'?)"),
        ([user({"text": "x"})], "messages[0].content[0].type: unknown 'None'"),
        ([user({"type": "text", "text": None})], "messages[0].content[0].text is a NoneType"),
        (
            [user({"type": "image_url", "image_url": DATA_URL})],
            "messages[0].content[0].image_url must be a dict",
        ),
        (
            [user({"type": "input_image", "image_url": {"url": DATA_URL}})],
            "messages[0].content[0].image_url is a dict; expected a string",
        ),
        ([user("a", {"type": "image"})], "messages[0].content[1] has no 'image'"),
        ([user("a", image(b"x"))], "messages[0].content[1]: the image cannot be read"),
        ([user({"type": "video", "video": []})], "messages[0].content[0]: got a video of 0 frames"),
    ],
)
def test_malformed_messages_are_refused_by_name(messages: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=re.escape(complaint)):
        render(renderer(), messages)


@pytest.mark.parametrize("value", [str(PICTURE), PICTURE, PICTURE.read_bytes()])
def test_embeddings_are_tensors_and_never_a_file(value: Any) -> None:
    message = user({"type": "image_embeds", "image_embeds": value}, "q")
    with pytest.raises(MediaError, match=r"content\[0\]: got embeddings as a .*expected tensors"):
        render(renderer(local_files=False), [message])


def test_files_are_read_only_for_trusted_callers() -> None:
    chat = renderer(local_files=False)
    for part in (image(str(PICTURE)), {"type": "image_url", "image_url": {"url": PICTURE.as_uri()}}):
        with pytest.raises(MediaError, match=re.escape("messages[0].content[0]: local files are not read")):
            render(chat, [user(part)])
    assert render(chat, [user({"type": "image_url", "image_url": {"url": DATA_URL}})]).media


def test_limits_are_checked_before_anything_is_decoded() -> None:
    with pytest.raises(MediaError, match=r"At most 1 image\(s\)"):
        render(renderer(limits={"image": 1}), [user(image(b"x"), image(b"y"))])
    with pytest.raises(
        RequestError, match=r"content\[0\]: this model does not take video \(it takes image\)"
    ):
        render(renderer(placeholders=NUMBERED), [user({"type": "video", "video": []})])


# --- templates ------------------------------------------------------------------------------------


def test_options_reach_the_template() -> None:
    template = (
        "{{ flavour }}|{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if tools %}{{ tools | length }}{% endif %}{% if add_generation_prompt %}>{% endif %}"
    )
    chat = renderer(template)
    messages = [user("hi"), {"role": "assistant", "content": None, "name": "x"}]
    assert render(chat, [user("hi")], chat_template_kwargs={"flavour": "mild"}).text == "mild|hi>"
    assert render(chat, messages[:1], add_generation_prompt=False, tools=[TOOL]).text == "|hi1"
    assert render(chat, messages).text == "|hi>"
    with pytest.raises(RequestError, match="cannot set chat_template"):
        render(chat, messages, chat_template_kwargs={"chat_template": "x"})


def test_the_final_message_can_be_left_open() -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
    messages = [user("hi"), {"role": "assistant", "content": "It is"}]
    chat = renderer(template)
    opened = render(chat, messages, continue_final_message=True)
    assert opened.text == "[user]hi<end>[assistant]It is"
    with pytest.raises(RequestError, match="set only one"):
        render(chat, messages, continue_final_message=True, add_generation_prompt=True)


def test_templates_are_sandboxed_and_their_refusals_are_request_errors() -> None:
    refusing = renderer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate"):
        render(refusing, [user("x")])
    escaping = renderer("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError, match="template refused"):
        render(escaping, [user("x")])
    with pytest.raises(RequestError, match=r"no chat template; pass chat_template .*--chat-template"):
        render(renderer(None), [user("x")])
    with pytest.raises(ConfigError, match="line 2"):
        renderer("fine\n{% for %}")


@pytest.mark.parametrize(
    ("template", "traits"),
    [
        (STRING_TEMPLATE, ("string", False)),
        (PARTS_TEMPLATE, ("openai", False)),
        (
            "{% for m in messages %}{% for p in m['content'] | selectattr('type') %}{% endfor %}{% endfor %}",
            ("openai", False),
        ),
        (
            "{% for m in messages %}{% set c = m.content %}{% if c is string %}{{ c }}{% else %}"
            "{% for p in c %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
            ("openai", True),
        ),
        (
            "{% macro show(body) %}{% for p in body %}{{ p.text }}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
            ("openai", False),
        ),
        (
            "{% macro show(body) %}{% for p in body %}{{ p.text }}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ show(body=m.content) }}{% endfor %}",
            ("openai", False),
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}"
            "{% endfor %}",
            ("string", False),
        ),
    ],
)
def test_what_a_template_wants_is_read_from_its_syntax(template: str, traits: tuple[Any, bool]) -> None:
    found = ChatTemplate(template, TOKENIZER)
    assert (found.format, found.takes_strings) == traits
    assert ChatTemplate(template, TOKENIZER, "string").format == "string"


def test_generation_tags_render() -> None:
    chat = renderer("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    assert render(chat, [user("x")]).text


def test_the_users_template_comes_before_the_checkpoints_and_the_plugins(tmp_path: Path) -> None:
    given = tmp_path / "given.jinja"
    given.write_text("given")
    found = [
        resolve_chat_template(None),
        resolve_chat_template(None, default="plugin's"),
        resolve_chat_template(None, own="checkpoint's", default="plugin's"),
    ]
    found += [resolve_chat_template(way, own="checkpoint's") for way in (given, str(given), "{{ inline }}")]
    assert found == [None, "plugin's", "checkpoint's", "given", "given", "{{ inline }}"]
    with pytest.raises(ConfigError, match="neither a readable file"):
        resolve_chat_template("no-such-file.jinja")


def test_a_ready_made_item_passes_as_it_is() -> None:
    item = MediaItem(modality="image", digest="d", pixels=np.zeros((2, 2, 3), np.uint8))
    [opened] = render(renderer(), [user(image(item))]).media["image"]
    assert opened.decode() is item


def test_the_familys_content_format_is_that_of_its_own_template() -> None:
    loops = "{% for m in messages %}{% for p in m.content %}{{ p }}{% endfor %}{% endfor %}"

    def chosen(own: str | None = None, **settings: Any) -> str:
        spec = ModelSpec(
            architecture="Toy",
            build=lambda context: None,  # type: ignore[arg-type,return-value]
            default_chat_template=loops,
            content_format="string",
        )
        named = {"default": own} if own else {}
        checkpoint = Checkpoint(path=MODEL, architecture="Toy", config={}, chat_templates=named)
        template = _chat_template(EngineConfig(model="m", **settings), checkpoint, spec, TOKENIZER)
        assert template is not None
        return template.format

    assert chosen() == "string"
    assert chosen(own=loops + " ") == "openai", "the checkpoint's own template speaks for itself"
    assert chosen(chat_template=loops + "\n") == "openai"
    assert chosen(chat_template_content_format="openai") == "openai"


def test_a_placeholder_next_to_its_picture_is_text_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chat = renderer()
    for _ in range(2):
        assert render(chat, [user(image(), "<image> is what?")]).text == "[user]<image>\n<image> is what?"
    assert [record.getMessage()[:46] for record in caplog.records] == [
        "a message with media has '<image>' in its text"
    ]
