"""What is between a user's words and the engine, for one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opsin.api import InputContext, ModelSpec, ProcessedPrompt, ToolFormat
from opsin.api.hermes import HermesTools
from opsin.checkpoint.files import Checkpoint
from opsin.checkpoint.hub import locate
from opsin.checkpoint.tokenizer import ChatTokenizer, load_tokenizer
from opsin.config import EngineConfig
from opsin.errors import CheckpointError
from opsin.inputs.cache import ByteLRU
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
    hidden_size: int,
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
    )
    try:
        mappers = {m: mapper for m, s in mapper_specs.items() if (mapper := s.build(context)) is not None}
        placeholders = {
            m: text for m, s in placeholder_specs.items() if (text := s.build(context)) is not None
        }
    except ValueError as error:  # settings the family cannot follow
        raise CheckpointError(f"the settings in {checkpoint.path}: {error}") from error
    processor = PromptProcessor(
        model_spec=spec,
        mappers=mappers,
        placeholders=placeholders,
        tokenizer=tokenizer,
        config=checkpoint.config,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        limits=config.limit_mm_per_prompt or {},
        options=config.mm_processor_kwargs,
        media_limits=config,
        mapped_media=ByteLRU(config.media_cache_memory),
    )
    if config.tool_call_parser == "hermes":
        tool_format: ToolFormat | None = HermesTools()
    else:
        tool_format = spec.tool_format and spec.tool_format(checkpoint.config)
    renderer = ChatRenderer(
        tokenizer=tokenizer,
        template=_chat_template(config, checkpoint, spec, tokenizer),
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


def _chat_template(
    config: EngineConfig, checkpoint: Checkpoint, spec: ModelSpec, tokenizer: ChatTokenizer
) -> ChatTemplate | None:
    default = spec.default_chat_template
    if callable(default):
        default = default(checkpoint.config)
    source = resolve_chat_template(config.chat_template, own=checkpoint.chat_template, default=default)
    if source is None:
        return None
    if config.chat_template_content_format != "auto":
        return ChatTemplate(source, tokenizer, config.chat_template_content_format)
    return ChatTemplate(source, tokenizer, spec.content_format if source is default else None)


def _eos_token_ids(checkpoint: Checkpoint, spec: ModelSpec, tokenizer: ChatTokenizer) -> frozenset[int]:
    """Ids that end a text: the checkpoint's, and those of the family that the tokenizer has."""
    ids = set(checkpoint.eos_token_ids)
    for text in spec.stop_tokens:
        token = tokenizer.convert_tokens_to_ids(text)
        # For a text that is no token, the tokenizer returns the id of the unknown token, or None.
        if token is not None and tokenizer.decode([token], skip_special_tokens=False) == text:
            ids.add(token)
    return frozenset(ids)
