"""Chat templates: which one, what content it wants, and rendering it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2 import ext, nodes
from jinja2.parser import Parser

from opsin.checkpoint.tokenizer import ChatTokenizer
from opsin.errors import ConfigError, RequestError

ContentFormat = Literal["openai", "string"]
_OPTIONS = {"chat_template", "tokenize", "tools", "add_generation_prompt", "continue_final_message"}


class ChatTemplate:
    """A Jinja chat template bound to a tokenizer.

    Attributes:
        source: Jinja text.
        format: ``"openai"`` if it loops over the parts of a message's content, ``"string"`` if it wants text.
        takes_strings: whether a template that loops over parts also tests for plain text.
    """

    def __init__(self, source: str, tokenizer: ChatTokenizer, content_format: ContentFormat | None = None):
        """Parse the template.

        Its syntax tree shows whether it loops over the content: directly, through filters, under another name
        (``{% set content = message.content %}``), or in a macro whose argument is the content.

        Args:
            source: Jinja text.
            tokenizer: renders it, and provides ``bos_token`` and the like.
            content_format: format to use; None: as the template shows.

        Raises:
            ConfigError: the template is not valid Jinja.
        """
        self.source = source
        self._tokenizer = tokenizer
        environment = jinja2.Environment(extensions=[_GenerationTag, ext.loopcontrols])  # never renders
        try:
            tree = environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {error.message}"
            raise ConfigError(f"the chat template is not valid Jinja: {reason}") from None
        names = _content_names(tree)
        loops = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
        tests = (test.node for test in tree.find_all(nodes.Test) if test.name == "string")
        self.format: ContentFormat = content_format or ("openai" if loops else "string")
        self.takes_strings = any(_is_content(node, names) for node in tests)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """Messages as the template wants them -> prompt text.

        Raises:
            RequestError: the template refuses these messages.
        """
        taken = sorted(_OPTIONS & set(variables))
        if taken:
            raise RequestError(
                f"chat_template_kwargs cannot set {', '.join(taken)}: these have their own fields"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RequestError(f"the chat template refused these messages: {error}") from None
        except (ArithmeticError, AttributeError, LookupError, RecursionError) as error:
            # Not raised on purpose by a template: its text would tell a client nothing.
            raise RequestError(f"the chat template refused these messages: {type(error).__name__}") from None
        return str(text)


def resolve_chat_template(
    given: str | Path | None, *, own: str | None = None, default: str | None = None
) -> str | None:
    """The chat template to use: the user's (a file, or Jinja text), else the checkpoint's, else the plugin's.

    Raises:
        ConfigError: ``given`` is neither a file nor Jinja text.
    """
    if given is None:
        return own or default
    if isinstance(given, str) and ("{%" in given or "{{" in given or "\n" in given):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template={str(given)!r} is neither a readable file ({type(error).__name__}) nor Jinja text"
        ) from None


class _GenerationTag(ext.Extension):
    """transformers' ``{% generation %}...{% endgeneration %}``, which only marks what the assistant said."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it a set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _content_names(tree: nodes.Template) -> set[str]:
    """Names of variables and macro parameters that hold a message's content."""
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    names: set[str] = set()
    while True:
        more = {
            assign.target.name
            for assign in tree.find_all(nodes.Assign)
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names)
        }
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name in macros:
                parameters = macros[call.node.name].args
                pairs = [(p.name, arg) for p, arg in zip(parameters, call.args)]
                pairs += [(keyword.key, keyword.value) for keyword in call.kwargs]
                more |= {name for name, value in pairs if _is_content(value, names)}
        if more <= names:
            return names
        names |= more


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    while isinstance(node, nodes.Filter):
        node = node.node
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    )
