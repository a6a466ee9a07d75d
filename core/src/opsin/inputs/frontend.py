"""What stands between a user's words and the engine, built for one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsin.api import InputContext, ModelSpec, ProcessedPrompt, Tokenizer, ToolFormat
from opsin.api.hermes import HermesTools
from opsin.checkpoint.files import Checkpoint, settings_explained
from opsin.checkpoint.hub import locate
from opsin.checkpoint.tokenizer import ChatTokenizer, load_tokenizer
from opsin.config import EngineConfig
from opsin.errors import CheckpointError
from opsin.inputs.chat import ChatOptions, ChatRenderer
from opsin.inputs.conversation import Conversation
from opsin.inputs.grammar import GrammarCompiler
from opsin.inputs.processor import PromptProcessor
from opsin.inputs.template import resolve_chat_template
from opsin.plugins import Plugins


@dataclass(frozen=True, kw_only=True)
class Frontend:
    """The parts, all of them usable from any thread.

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
        """Render and process a conversation.

        Args:
            conversation: from `conversation`.
            options: how it becomes a prompt.
            min_new_tokens: room the context must leave; 0 for an embedding request.

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
    tokenizer = load_tokenizer(locate(config.tokenizer) if config.tokenizer else checkpoint.path)
    architecture = checkpoint.architecture
    context = InputContext(
        config=checkpoint.config,
        preprocessor=checkpoint.preprocessor,
        tokenizer=tokenizer,
        options=config.mm_processor_kwargs,
        video_preprocessor=checkpoint.video_preprocessor,
        read_json=checkpoint.read_json,
    )
    mappers = _built(plugins.input_mappers(architecture), context, checkpoint)
    placeholders = _built(plugins.placeholders(architecture), context, checkpoint)
    processor = PromptProcessor(
        model_spec=spec,
        mappers=mappers,
        placeholders=placeholders,
        tokenizer=tokenizer,
        config=checkpoint.config,
        limits=config.limit_mm_per_prompt,
        options=config.mm_processor_kwargs,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        media_limits=config,
        media_cache_bytes=config.media_cache_memory,
    )
    content_format = config.chat_template_content_format
    tool_format = _tool_format(config, checkpoint, spec)
    renderer = ChatRenderer(
        tokenizer=tokenizer,
        chat_template=resolve_chat_template(
            None if config.chat_template in checkpoint.chat_templates else config.chat_template,
            own=checkpoint.chat_templates.get(config.chat_template or "default"),
            default=_default_chat_template(spec, checkpoint, chosen=config.chat_template is not None),
        ),
        placeholders=placeholders,
        content_format=None if content_format == "auto" else content_format,
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


def _tool_format(config: EngineConfig, checkpoint: Checkpoint, spec: ModelSpec) -> ToolFormat | None:
    if config.tool_call_parser == "hermes":
        return HermesTools()
    return spec.tool_format and spec.tool_format(checkpoint.config)


def _default_chat_template(spec: ModelSpec, checkpoint: Checkpoint, *, chosen: bool) -> str | None:
    template = spec.default_chat_template
    if checkpoint.chat_templates and checkpoint.chat_template is None and not chosen:
        raise CheckpointError(
            f"{checkpoint.path} has chat templates named {', '.join(checkpoint.chat_templates)}, and none "
            "named default; pass the name of one as chat_template"
        )
    if not callable(template):
        return template
    with settings_explained(checkpoint.path, template):
        return template(checkpoint.config)


def _eos_token_ids(checkpoint: Checkpoint, spec: ModelSpec, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a text: the checkpoint's, its tokenizer's, and the family's that the tokenizer has."""
    ids = {*checkpoint.eos_token_ids}
    own = getattr(tokenizer, "eos_token_id", None)
    if own is not None:
        ids.add(own)
    for text in spec.stop_tokens:
        token = tokenizer.convert_tokens_to_ids(text)
        # A text that is no token is given the id of the unknown one, or None.
        if token is not None and tokenizer.decode([token], skip_special_tokens=False) == text:
            ids.add(token)
    return frozenset(ids)
