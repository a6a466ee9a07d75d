"""``opsin chat``: conversations, commands, and a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opsin import LLM, SamplingParams
from opsin.cli.chat import Session, opener
from opsin.cli.chat.conversation import Attachment, Commands, Conversation
from opsin.cli.chat.terminal import printable
from opsin.config import EngineConfig
from opsin.errors import ConfigError, DeviceLostError, OpsinError

MODEL = "opsin/tiny-qwen2vl"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A red square on grey, in a file whose name has a space."""
    canvas = Image.new("RGB", (112, 112), (120, 120, 120))
    canvas.paste((215, 30, 35), (40, 40, 72, 72))
    path = tmp_path / "a red square.png"
    canvas.save(path)
    return path


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(SamplingParams(max_tokens=20))


@pytest.fixture
def commands(conversation: Conversation) -> Commands:
    return Commands(conversation, lambda kind, name: Attachment(kind, name, {"type": kind, kind: name}))


# --- what commands do ---


def test_pictures_wait_for_the_next_question_and_go_with_it_alone(
    conversation: Conversation, commands: Commands
) -> None:
    assert commands.run("/image a.png 'b c.png'") == "2 pictures with the next question"
    assert commands.run("/video d.mp4") == "2 pictures and 1 video with the next question"
    conversation.ask("What?").answer = "This."
    conversation.ask("And now?")
    first, answer, second = conversation.messages()
    assert [part["type"] for part in first["content"]] == ["image", "image", "video", "text"]
    assert first["content"][1] == {"type": "image", "image": "b c.png"}
    assert answer == {"role": "assistant", "content": "This."}
    assert second["content"] == [{"type": "text", "text": "And now?"}]


def test_drop_undo_and_clear(conversation: Conversation, commands: Commands) -> None:
    commands.run("/image a.png")
    commands.run("/drop")
    assert conversation.waiting == []
    conversation.ask("One").answer = "1"
    conversation.ask("Two").answer = "2"
    assert commands.run("/undo") == "taken back: Two"
    assert [message["role"] for message in conversation.messages()] == ["user", "assistant"]
    commands.run("/system Be brief.")
    commands.run("/clear")
    assert conversation.messages() == [{"role": "system", "content": "Be brief."}]
    commands.run("/system")
    assert conversation.messages() == []
    with pytest.raises(ConfigError, match="nothing to take back"):
        commands.run("/undo")


def test_set_reaches_the_parameters_and_says_when_it_is_of_no_use(
    conversation: Conversation, commands: Commands
) -> None:
    assert commands.run("/set temperature 0.7") == "temperature is 0.7 now"
    assert commands.run("/set stop red") == "stop is red now"
    assert (conversation.params.temperature, list(conversation.params.stop)) == (0.7, ["red"])
    assert "temperature 0.7" in commands.run("/set")
    commands.run("/set top_k 1")
    assert "no effect" in commands.run("/set temperature 0.5")
    assert "no effect" not in commands.run("/set temperature 0")
    with pytest.raises(ConfigError, match="did you mean 'top_p'"):
        commands.run("/set topp 1")
    with pytest.raises(OpsinError, match="top_p"):
        commands.run("/set top_p 7")
    assert conversation.params.top_p == 1.0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/imgae a.png", r"did you mean '/image'\?"),
        ("/image", "needs a file"),
        ("/image 'a.png", "cannot be read"),
        ("/save", "needs a file"),
        ("/save /nowhere/at/all.json", "cannot be written"),
    ],
)
def test_wrong_commands_say_what_to_do(commands: Commands, line: str, says: str) -> None:
    with pytest.raises(OpsinError, match=says):
        commands.run(line)


def test_help_names_every_command(commands: Commands) -> None:
    text = commands.run("/help")
    assert all(f"\n{name}" in f"\n{text}" for name in commands.names)


def test_saved_conversations_name_their_pictures(
    conversation: Conversation, commands: Commands, tmp_path: Path
) -> None:
    commands.run("/image a.png")
    conversation.ask("Où?").answer = "Là."
    commands.run(f"/save '{tmp_path}/a b.json'")
    assert json.loads((tmp_path / "a b.json").read_text("utf-8")) == [
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Où?"}],
        },
        {"role": "assistant", "content": "Là."},
    ]


def test_a_models_words_do_not_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\tc\nd é") == "a�[2Jb�\tc\nd é"


# --- sessions ---


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL) as llm:
        yield llm


def session(llm: LLM, as_json: bool = True) -> tuple[Session, Conversation]:
    conversation = Conversation(SamplingParams(temperature=0, max_tokens=24))
    commands = Commands(conversation, opener(EngineConfig(model=MODEL)))
    return Session(llm, conversation, commands, as_json), conversation


def test_answers_are_about_the_picture_and_remember_it(
    llm: LLM, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk, conversation = session(llm)
    talk.talk(
        [f"/image '{picture}'", "What colour is the square?", "What shape is it?", "/retry", "/exit", "No"]
    )
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == ["red", "square", "square"]
    assert [answer["finish_reason"] for answer in answers] == ["stop"] * 3
    assert len(conversation.turns) == 2
    assert answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"]


def test_a_failed_question_is_taken_back_and_the_next_is_answered(
    llm: LLM, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk, conversation = session(llm)
    lines = [
        f"/image '{picture}' nowhere.png",
        "/image http://127.0.0.1:9/a.png",
        "What?",
        "//help",
        "/retyr",
        "Hello",
    ]
    talk.talk(lines)
    captured = capsys.readouterr()
    assert [json.loads(line)["question"] for line in captured.out.splitlines()] == ["/help", "Hello"]
    said = captured.err.splitlines()
    assert "nowhere.png" in said[0]
    assert "127.0.0.1" in said[2]
    assert "did you mean '/retry'" in captured.err
    assert len(conversation.turns) == 2


class Broken:
    """A model whose device is gone after so many pieces of an answer."""

    def __init__(self, error: BaseException, output: Any) -> None:
        self.error, self.output = error, output

    def stream_chat(self, messages: Any, params: Any) -> Iterator[Any]:
        yield from self.output
        raise self.error


def test_ctrl_c_keeps_what_was_said_and_the_conversation(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    first = next(iter(llm.stream_chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=3))))
    conversation = Conversation(SamplingParams())
    commands = Commands(conversation, lambda kind, name: Attachment(kind, name, {}))
    Session(Broken(KeyboardInterrupt(), [first]), conversation, commands, True).talk(["Hi"])  # type: ignore[arg-type]
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "interrupted"
    assert conversation.turns[0].answer == first.outputs[0].text
    Session(Broken(KeyboardInterrupt(), []), conversation, commands, True).talk(["Hi"])  # type: ignore[arg-type]
    assert "taken back" in capsys.readouterr().err
    assert len(conversation.turns) == 1
    lost = Session(Broken(DeviceLostError("gone"), []), conversation, commands, True)  # type: ignore[arg-type]
    with pytest.raises(DeviceLostError):
        lost.talk(["Hi", "Hi again"])


# --- a terminal ---


class Terminal:
    """``opsin chat`` in a pseudo terminal."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "XDG_STATE_HOME": str(folder), "TERM": "xterm", "HF_HUB_OFFLINE": "1"}
        environment.pop("NO_COLOR", None)
        self.primary, secondary = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opsin", "chat", MODEL],
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        os.close(secondary)
        self.seen = ""

    def until(self, wanted: str, seconds: float = 120) -> str:
        """What is shown up to where the pattern is found."""
        deadline = time.monotonic() + seconds
        while not re.search(wanted, self.seen):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.primary], [], [], 0.2)[0]:
                data = os.read(self.primary, 65536).decode(errors="replace")
                self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data)
                if "\x1b[6n" in data:  # prompt_toolkit asks where the cursor is
                    os.write(self.primary, b"\x1b[1;1R")
        seen, self.seen = self.seen, ""
        return seen

    def type(self, text: str) -> None:
        os.write(self.primary, text.encode())


def test_a_conversation_in_a_terminal(tmp_path: Path, picture: Path) -> None:
    terminal = Terminal(tmp_path)
    try:
        terminal.until(r"Ctrl-D ends")
        terminal.type("/imag\t")
        terminal.until("/image")
        terminal.type("a\t")
        terminal.until(r"red\\? ")
        terminal.type("\x03")  # Ctrl-C empties the line
        terminal.type(f"/image '{picture.name}'\r")
        terminal.until(r"1 picture with the next question[\s\S]*> ")
        terminal.type("What colour\x1b\ris the square?\r")  # Esc Enter: a new line in the question
        assert "red" in terminal.until(r"tokens in [\d.]+ s, context \d+ of [\d,]+[\s\S]*> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        if terminal.process.poll() is None:
            terminal.process.send_signal(signal.SIGKILL)
        os.close(terminal.primary)
    history = tmp_path / "opsin/chat-history"
    assert "+What colour\n+is the square?" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
