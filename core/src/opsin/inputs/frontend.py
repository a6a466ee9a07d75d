"""What is between a user's words and the engine, for one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from opsin.api import InputContext, ModelSpec, ProcessedPrompt, ToolFormat
from opsin.api.hermes import HermesTools
from opsin.checkpoint.files import Checkpoint, settings_explained
from opsin.checkpoint.hub import locate
from opsin.checkpoint.processor import load_image_processor
from opsin.checkpoint.tokenizer import ChatTokenizer, load_tokenizer
from opsin.config import EngineConfig
from opsin.errors import CheckpointError
from opsin.inputs.cache import ByteLRU, HeldMedia
from opsin.inputs.chat import ChatOptions, ChatRenderer
from opsin.inputs.conversation import Conversation
from opsin.inputs.grammar import GrammarCompiler
from opsin.inputs.processor import PromptProcessor
from opsin.inputs.template import ChatTemplate, resolve_chat_template
from opsin.plugins import Plugins


@dataclass(frozen=True, kw_only=True)
class Frontend:
    """The parts, all of them thread-safe.

    Attributes:
        tokenizer: the checkpoint's, or the one asked for.
        processor: prompts -> `ProcessedPrompt`.
        renderer: conversations -> prompts.
        eos_token_ids: ids that end a text.
        grammars: constraints on the output.
        tool_format: form of tool calls; None: the model makes none.
    """

    tokenizer: ChatTokenizer
    processor: PromptProcessor
    renderer: ChatRenderer
    eos_token_ids: frozenset[int]
    grammars: GrammarCompiler
    tool_format: ToolFormat | None

    def conversation(self, messages: Any) -> Conversation:
        """Parse messages, and refuse media that the model does not take.

        Raises:
            RequestError: they cannot be used.
        """
        conversation = Conversation.parse(messages)
        self.renderer.check(conversation)
        return conversation

    def chat(
        self, conversation: Conversation, options: ChatOptions, *, min_new_tokens: int = 1
    ) -> ProcessedPrompt:
        """Render and process a conversation; ``min_new_tokens`` as for `PromptProcessor.process`.

        Raises:
            RequestError: it cannot be used.
        """
        prompt = self.renderer.render(conversation, options)
        return self.processor.process(prompt, min_new_tokens=min_new_tokens)


def build_frontend(
    config: EngineConfig,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    plugins: Plugins,
    *,
    max_model_len: int,
    vocab_size: int,
    media_width: int,
) -> Frontend:
    """Build the parts from the family's specs and the checkpoint's files.

    Raises:
        CheckpointError: the family cannot follow the checkpoint's settings, or its tokenizer is unreadable.
        ConfigError: a limit or an option is unknown to the family.
    """
    architecture = checkpoint.architecture
    mapper_specs, placeholder_specs = plugins.input_mappers(architecture), plugins.placeholders(architecture)
    tokenizer = load_tokenizer(locate(config.tokenizer) if config.tokenizer else checkpoint.path)
    context = InputContext(
        config=checkpoint.config,
        preprocessor=checkpoint.preprocessor,
        tokenizer=tokenizer,
        options=config.mm_processor_kwargs,
        video_preprocessor=checkpoint.video_preprocessor,
        read_json=checkpoint.read_json,
        load_image_processor=partial(load_image_processor, checkpoint.path),
    )
    mappers = _built(mapper_specs, context, checkpoint)
    placeholders = _built(placeholder_specs, context, checkpoint)
    for modality, placeholder in placeholders.items():
        token, text = placeholder.token_id, placeholder.text(1)
        if token is not None and tokenizer.encode(text, add_special_tokens=False).count(token) != 1:
            raise CheckpointError(
                f"the placeholder of a {modality}, {text!r}, does not have its token {token} once in this "
                "tokenizer; config.json and tokenizer are not of one model"
            )
    processor = PromptProcessor(
        model_spec=spec,
        mappers=mappers,
        placeholders=placeholders,
        tokenizer=tokenizer,
        config=checkpoint.config,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        media_width=media_width,
        limits=config.limit_mm_per_prompt or {},
        options=config.mm_processor_kwargs,
        media_limits=config,
        mapped_media=ByteLRU(config.media_cache_memory),
        held_media=HeldMedia(config.pending_media_memory),
    )
    if config.tool_call_parser == "hermes":
        tool_format: ToolFormat | None = HermesTools()
    else:
        tool_format = spec.tool_format and spec.tool_format(checkpoint.config)
    renderer = ChatRenderer(
        tokenizer=tokenizer,
        template=_chat_template(config, checkpoint, spec, tokenizer),
        tool_template=_tool_template(config, checkpoint, tokenizer),
        placeholders=placeholders,
        tool_format=tool_format,
        limits=processor.limits,
        media_limits=config,
        local_files=config.local_media,
    )
    eos = _eos_token_ids(checkpoint, spec, tokenizer)
    return Frontend(
        tokenizer=tokenizer,
        processor=processor,
        renderer=renderer,
        eos_token_ids=eos,
        grammars=GrammarCompiler(tokenizer, vocab_size, sorted(eos)),
        tool_format=tool_format,
    )


def _built(specs: Mapping[str, Any], context: InputContext, checkpoint: Checkpoint) -> dict[str, Any]:
    """Modality -> what its spec builds for this checkpoint, where it takes the modality."""
    built = {}
    for modality, spec in specs.items():
        with settings_explained(checkpoint.path, spec.build):
            part = spec.build(context)
        if part is not None:
            built[modality] = part
    return built


def _chat_template(
    config: EngineConfig, checkpoint: Checkpoint, spec: ModelSpec, tokenizer: ChatTokenizer
) -> ChatTemplate | None:
    default = spec.default_chat_template
    if callable(default):
        with settings_explained(checkpoint.path, default):
            default = default(checkpoint.config)
    given, named = config.chat_template, checkpoint.chat_templates
    if named and given is None and "default" not in named:
        raise CheckpointError(
            f"{checkpoint.path} has chat templates named {', '.join(named)}, and none named default; pass "
            "the name of one as chat_template"
        )
    own = named.get(given or "default")
    source = resolve_chat_template(None if given in named else given, own=own, default=default)
    if source is None:
        return None
    if config.chat_template_content_format != "auto":
        return ChatTemplate(source, tokenizer, config.chat_template_content_format)
    return ChatTemplate(source, tokenizer, spec.content_format if source is default else None)


def _tool_template(
    config: EngineConfig, checkpoint: Checkpoint, tokenizer: ChatTokenizer
) -> ChatTemplate | None:
    """The template of this name, which transformers takes as soon as there are tools."""
    source = checkpoint.chat_templates.get("tool_use")
    if source is None or config.chat_template is not None:
        return None
    given = config.chat_template_content_format
    return ChatTemplate(source, tokenizer, None if given == "auto" else given)


def _eos_token_ids(checkpoint: Checkpoint, spec: ModelSpec, tokenizer: ChatTokenizer) -> frozenset[int]:
    """Ids that end a text: the checkpoint's, its tokenizer's, and those of the family that the latter has."""
    own = getattr(tokenizer, "eos_token_id", None)
    ids = {*checkpoint.eos_token_ids, *([] if own is None else [own])}
    for text in spec.stop_tokens:
        token = tokenizer.convert_tokens_to_ids(text)
        # For a text that is no token, the tokenizer returns the id of the unknown token, or None.
        if token is not None and tokenizer.decode([token], skip_special_tokens=False) == text:
            ids.add(token)
    return frozenset(ids)
