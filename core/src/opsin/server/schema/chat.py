"""The body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from opsin.inputs.chat import ChatOptions
from opsin.inputs.conversation import NO_SIZE, SIZE_FIELDS, Role
from opsin.params import MAX_LOGPROBS
from opsin.server.schema.sampling import SamplingRequest
from opsin.server.schema.strict import FIRST_FAULT, RequestBody, StrictModel, content_kind, field_error


class _Part(StrictModel):
    uuid: str | None = None
    """Accepted; pictures are known by their content."""
    cache_control: dict[str, Any] | None = None
    """Accepted; what is kept is the server's to decide."""


class TextPart(_Part):
    """Text."""

    type: Literal["text", "input_text"]
    text: str


class _MediaPart(_Part):
    @model_validator(mode="before")
    @classmethod
    def _has_no_size(cls, data: Any) -> Any:
        for name in SIZE_FIELDS:
            if isinstance(data, dict) and data.get(name) is not None:
                raise ValueError(f"{name}: {NO_SIZE}")
        return data


class MediaUrl(StrictModel):
    """Where a picture or video is: an http(s), ``data:`` or (if the server shares a folder) file URL."""

    url: str
    detail: str | None = None
    """Accepted; use ``mm_processor_kwargs`` for the resolution."""


def _no_bare_url(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError('expected {"url": ...}, got a bare string')
    return value


class ImageUrlPart(_MediaPart):
    """A picture by URL."""

    type: Literal["image_url"]
    image_url: Annotated[MediaUrl, BeforeValidator(_no_bare_url)]


class InputImagePart(_MediaPart):
    """A picture by URL, as OpenAI's newer requests write it."""

    type: Literal["input_image"]
    image_url: str
    detail: str | None = None


class ImagePart(_MediaPart):
    """A picture by URL, as the examples on many model cards write it."""

    type: Literal["image"]
    image: str


class VideoUrlPart(_MediaPart):
    """A video file by URL."""

    type: Literal["video_url"]
    video_url: Annotated[MediaUrl, BeforeValidator(_no_bare_url)]


class VideoPart(_MediaPart):
    """A video file by URL, or its frames by theirs, with the number of frames per second if it is known."""

    type: Literal["video"]
    video: str | Annotated[list[str], FIRST_FAULT]
    fps: Annotated[float | None, Field(gt=0)] = None


_MAX_EMBEDS = 16


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MAX_EMBEDS:
        raise ValueError(f"at most {_MAX_EMBEDS} named tensors are accepted")
    return value


_Embeds = Annotated[str | dict[str, str], BeforeValidator(_few)]
"""One encoded tensor, or several by name."""


class ImageEmbedsPart(_MediaPart):
    """Ready-made embeddings of a picture, safetensors or .npy in base64, where the server takes them."""

    type: Literal["image_embeds"]
    image_embeds: _Embeds


class VideoEmbedsPart(_MediaPart):
    """Ready-made embeddings of a video, safetensors or .npy in base64, where the server takes them."""

    type: Literal["video_embeds"]
    video_embeds: _Embeds


Part = Annotated[
    TextPart
    | ImageUrlPart
    | InputImagePart
    | ImagePart
    | VideoUrlPart
    | VideoPart
    | ImageEmbedsPart
    | VideoEmbedsPart,
    Field(discriminator="type"),
]


Content = Annotated[
    Annotated[str, Tag("as_text")] | Annotated[list[Part], FIRST_FAULT, Tag("as_parts")],
    Discriminator(content_kind),
]


class CalledFunction(StrictModel):
    """A function and its arguments as JSON text."""

    name: Annotated[str, Field(max_length=256)]
    arguments: str = "{}"


class MessageToolCall(StrictModel):
    """A call that the assistant made earlier."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(RequestBody):
    """A message of the conversation."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"annotations", "provider_specific_fields", "reasoning", "reasoning_content", "refusal"}
    )
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"audio": (), "function_call": ()}

    role: Role
    content: Content | None = None
    name: Annotated[str | None, Field(max_length=256)] = None
    tool_calls: Annotated[list[MessageToolCall] | None, FIRST_FAULT, Field(max_length=1024)] = None
    tool_call_id: Annotated[str | None, Field(max_length=256)] = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("this message has no content")
        return self


class Function(StrictModel):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """A tool; there are only functions."""

    type: Literal["function"]
    function: Function


class NamedFunction(StrictModel):
    """The function to call."""

    name: str


class NamedToolChoice(StrictModel):
    """Calls exactly this function."""

    type: Literal["function"]
    function: NamedFunction


def _tool_choice(value: Any) -> Any:
    if value is None or isinstance(value, (dict, NamedToolChoice)) or value in ("none", "auto", "required"):
        return value
    raise ValueError('expected "none", "auto", "required" or {"type": "function", "function": {"name": ...}}')


Messages = Annotated[list[Message], Field(min_length=1, max_length=10_000)]


class ChatFields(RequestBody):
    """How messages become a prompt."""

    messages: Messages | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Annotated[str | None, Field(max_length=100_000)] = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    allow_special_tokens: bool | None = None
    """Special tokens and placeholders in texts are what they look like; by default they are text."""

    @model_validator(mode="after")
    def _one_end(self) -> ChatFields:
        if self.continue_final_message and self.add_generation_prompt:
            raise field_error(
                "continue_final_message",
                "set only one of continue_final_message and add_generation_prompt",
            )
        return self

    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages as `Conversation.parse` takes them."""
        return [message.model_dump(exclude_none=True) for message in self.messages or ()]

    def options(self, *, tools: Sequence[Tool] = (), cache_salt: str | None = None) -> ChatOptions:
        """How the messages become a prompt."""
        return ChatOptions(
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=bool(self.continue_final_message),
            tools=[tool.model_dump(exclude_none=True) for tool in tools],
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
            mm_processor_kwargs=self.mm_processor_kwargs,
            cache_salt=cache_salt,
            allow_special_tokens=bool(self.allow_special_tokens),
        )


class ChatRequest(SamplingRequest, ChatFields):
    """The body of ``POST /v1/chat/completions``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingRequest.unsupported,
        "add_special_tokens": (False,),
        "audio": (),
        "documents": (),
        "function_call": ("none",),
        "functions": (),
        "include_reasoning": (True, False),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": (),
        "truncate_prompt_tokens": (),
        "web_search_options": (),
    }

    messages: Messages
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    echo: bool | None = None
    tools: Annotated[list[Tool] | None, Field(max_length=256)] = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedToolChoice | None, BeforeValidator(_tool_choice)
    ] = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _consistent_chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "top_logprobs needs logprobs=true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise field_error("tools", "tools: two functions have the same name")
        if isinstance(self.tool_choice, NamedToolChoice):
            if self.tool_choice.function.name not in names:
                raise field_error("tool_choice", "tool_choice names a function that is not among the tools")
        elif self.tool_choice == "required" and not names:
            raise field_error("tool_choice", 'tool_choice "required" needs tools')
        return self
