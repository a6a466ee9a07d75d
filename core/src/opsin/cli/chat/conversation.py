"""What a conversation in the terminal consists of, and the commands that change it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opsin.cli.asking import without_effect
from opsin.errors import ConfigError, OpsinError, did_you_mean
from opsin.params import SamplingParams

Part = dict[str, Any]
"""A piece of a message's content, as `opsin.LLM.chat` takes it."""


@dataclass
class Attachment:
    """A picture or video that goes with the next question.

    Attributes:
        kind: "image" or "video".
        name: the file or URL, as it was typed.
        part: what the model gets.
    """

    kind: str
    name: str
    part: Part


@dataclass
class Turn:
    """A question and its answer.

    Attributes:
        text: the question.
        attached: what was shown with it.
        answer: None while there is none.
    """

    text: str
    attached: Sequence[Attachment] = ()
    answer: str | None = None

    @property
    def question(self) -> Part:
        """The question as a message: pictures first, as most models were trained."""
        content = [*(each.part for each in self.attached), {"type": "text", "text": self.text}]
        return {"role": "user", "content": content}


@dataclass
class Conversation:
    """Turns so far, and what goes with the next one.

    Attributes:
        system: the system message; None for none.
        turns: questions with their answers.
        waiting: pictures and videos for the next question.
        params: how answers are sampled.
    """

    params: SamplingParams
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    waiting: list[Attachment] = field(default_factory=list)

    def ask(self, text: str) -> Turn:
        """Begin a turn with what is waiting. Its answer is set by whoever gets one; else `forget` it."""
        turn = Turn(text, tuple(self.waiting))
        self.waiting.clear()
        self.turns.append(turn)
        return turn

    def forget(self, turn: Turn) -> None:
        """Take back a turn that got no answer."""
        self.turns.remove(turn)

    def messages(self) -> list[Part]:
        """The conversation as `opsin.LLM.chat` takes it."""
        messages: list[Part] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns:
            messages.append(turn.question)
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def written(self) -> list[Part]:
        """The conversation as JSON can hold it: pictures and videos by their names."""
        messages: list[Part] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            shown = [{"type": each.kind, each.kind: each.name} for each in turn.attached]
            content = [*shown, {"type": "text", "text": turn.text}]
            messages.append({"role": "user", "content": content})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        return messages


Attach = Callable[[str, str], Attachment]
"""Opens a file or a URL: (kind, name)."""


class Commands:
    """What begins with a slash.

    Args:
        conversation: what the commands change.
        attach: opens what is to be shown.
    """

    def __init__(self, conversation: Conversation, attach: Attach) -> None:
        self._conversation = conversation
        self._attach = attach
        self._table: Mapping[str, tuple[Callable[[str], str], str, str]] = {
            "/image": (
                lambda text: self._show("image", text),
                "FILE|URL ...",
                "show pictures with the next question",
            ),
            "/video": (
                lambda text: self._show("video", text),
                "FILE|FOLDER ...",
                "show a video with the next question",
            ),
            "/drop": (self._drop, "", "do not show what is waiting"),
            "/system": (self._system, "[TEXT]", "set or remove the system message"),
            "/set": (self._set, "[NAME VALUE]", "change sampling, e.g. /set temperature 0.7; alone: show it"),
            "/undo": (self._undo, "", "take back the last question and its answer"),
            "/clear": (self._clear, "", "begin anew"),
            "/save": (self._save, "FILE", "write the conversation as JSON"),
            "/retry": (lambda _: "", "", "ask the last question again"),
            "/help": (self._help, "", "this list"),
            "/exit": (lambda _: "", "", "end (also Ctrl-D)"),
        }

    @property
    def names(self) -> list[str]:
        """All commands."""
        return list(self._table)

    def run(self, line: str) -> str:
        """Carry out a command; what there is to say about it.

        Raises:
            ConfigError: there is no such command, or it does not take this.
            OpsinError: a file cannot be shown.
        """
        name, _, rest = line.partition(" ")
        if name not in self._table:
            raise ConfigError(
                f"there is no command {name}{did_you_mean(name, self._table)}; /help lists them, "
                "and // begins a question with a slash"
            )
        return self._table[name][0](rest.strip())

    def _show(self, kind: str, text: str) -> str:
        names = _words(text)
        if not names:
            raise ConfigError(
                f"/{kind} needs a file, for example /{kind} {'cat.jpg' if kind == 'image' else 'film.mp4'}"
            )
        found = [self._attach(kind, name) for name in names]
        waiting = self._conversation.waiting
        waiting += found
        return f"{_count(waiting)} with the next question"

    def _drop(self, _: str) -> str:
        self._conversation.waiting.clear()
        return "nothing is waiting"

    def _system(self, text: str) -> str:
        self._conversation.system = text or None
        return "system message set" if text else "no system message"

    def _set(self, text: str) -> str:
        name, _, value = text.partition(" ")
        params = self._conversation.params
        if not name:
            standard = SamplingParams()
            unusual = {n: v for n, v in vars(params).items() if v != getattr(standard, n)}
            return ", ".join(f"{n} {v}" for n, v in unusual.items()) or "sampling as vLLM's defaults"
        if name not in vars(params):
            raise ConfigError(f"there is no setting {name!r}{did_you_mean(name, vars(params))}")
        try:
            given = json.loads(value)
        except ValueError:
            given = value
        changed = self._conversation.params = replace(params, **{name: given})
        note = without_effect(changed) if name == "temperature" else None
        return f"{name} is {given} now" + (f", but {note}: /set top_k 0" if note else "")

    def _undo(self, _: str) -> str:
        turns = self._conversation.turns
        if not turns:
            raise ConfigError("there is nothing to take back")
        return f"taken back: {turns.pop().text}"

    def _clear(self, _: str) -> str:
        self._conversation.turns.clear()
        self._conversation.waiting.clear()
        return "a new conversation"

    def _save(self, text: str) -> str:
        if not text:
            raise ConfigError("/save needs a file, for example /save chat.json")
        [name] = _words(text)[:1]
        path = Path(name).expanduser()
        try:
            path.write_text(
                json.dumps(self._conversation.written(), indent=2, ensure_ascii=False) + "\n", "utf-8"
            )
        except OSError as error:
            raise OpsinError(f"{path} cannot be written: {error.strerror}") from error
        return f"{len(self._conversation.turns)} turns in {path}"

    def _help(self, _: str) -> str:
        width = max(len(f"{name} {takes}") for name, (_, takes, _) in self._table.items())
        lines = [f"{f'{name} {takes}':{width}}  {about}" for name, (_, takes, about) in self._table.items()]
        return "\n".join(
            [*lines, "Esc Enter begins a new line; Ctrl-C ends an answer, not the conversation."]
        )


def _words(text: str) -> list[str]:
    """File names as a shell would read them: quoted, or with a backslash before a space."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} cannot be read: {error}") from error


def _count(waiting: Sequence[Attachment]) -> str:
    kinds = [each.kind for each in waiting]
    names = {"image": "picture", "video": "video"}
    counts = [(kinds.count(kind), name) for kind, name in names.items() if kind in kinds]
    return " and ".join(f"{count} {name}{'s' if count > 1 else ''}" for count, name in counts)
