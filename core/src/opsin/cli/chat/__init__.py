"""``opsin chat``: a conversation about pictures, in the terminal."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter, validators

from opsin.cli.asking import opened, sampled, without_effect
from opsin.cli.chat.conversation import Attach, Attachment, Commands, Conversation, Turn
from opsin.cli.errors import Debug, reported, usage
from opsin.cli.flags import build, takes
from opsin.config import EngineConfig
from opsin.errors import DeviceLostError, OpsinError
from opsin.plugins.known_packages import known_packages

if TYPE_CHECKING:
    from opsin.config import MediaLimits
    from opsin.llm import LLM
    from opsin.results import RequestOutput

app = App(
    "chat",
    help_epilogue=f"""Examples:

  opsin chat {next(iter(known_packages().checkpoints))} --image cat.jpg
  opsin chat ./model --quantization int8 --system "Answer in one sentence."
  opsin chat ./model --json < questions.txt

In the conversation /image FILE shows a picture with the next question, and
/help lists what else there is. Ctrl-C ends an answer, Ctrl-D the conversation.
""",
)


@app.default
@reported
@takes(EngineConfig)
def run(
    *,
    image: Sequence[str] = (),
    video: Sequence[str] = (),
    max_tokens: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 1024,
    temperature: float | None = None,
    system: str | None = None,
    as_json: Annotated[bool, Parameter("--json")] = False,
    verbose: Annotated[bool, Parameter(("--verbose", "-v"))] = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """Talk with a model about pictures and videos.

    Args:
        image: Picture to show with the first question: a file or URL. Also several times.
        video: Video file, or a folder of frames, to show with the first question. Also several times.
        max_tokens: Most tokens of an answer.
        temperature: Randomness; 0 always takes the best token. Default: the model's own.
        system: System message.
        as_json: Print one line of JSON for each answer; what commands say goes to standard error.
        verbose: Show what happens while loading.
        debug: Show the traceback of an error.
    """
    with usage():
        config = build(EngineConfig, settings)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="opsin: %(message)s")

    attach = opener(config)
    named = [("image", name) for name in image] + [("video", name) for name in video]
    waiting = [attach(kind, name) for kind, name in named]

    from opsin import LLM

    seed = settings.pop("seed", None)
    with LLM(**settings) as llm:
        params = sampled(llm.get_default_sampling_params(), max_tokens, temperature, seed)
        if temperature is not None and (note := without_effect(params)):
            print(f"opsin: {note}", file=sys.stderr)
        conversation = Conversation(params, system, waiting=waiting)
        Session(llm, conversation, Commands(conversation, attach), as_json).talk()


def opener(limits: MediaLimits) -> Attach:
    """Opens what a conversation shows: files at once, http(s) URLs when they are asked about."""

    def attach(kind: str, name: str) -> Attachment:
        if name.startswith(("http://", "https://")):
            address = f"{kind}_url"
            return Attachment(kind, name, {"type": address, address: {"url": name}})
        return Attachment(kind, name, opened(f"/{kind}", kind, name, limits))

    return attach


class Session:
    """Lines in, answers out, until there are no more lines.

    Args:
        llm: who answers.
        conversation: what was said.
        commands: what lines with a slash do.
        as_json: answers are lines of JSON.
    """

    def __init__(self, llm: LLM, conversation: Conversation, commands: Commands, as_json: bool) -> None:
        from rich.console import Console

        self._llm, self._conversation, self._commands = llm, conversation, commands
        self._as_json = as_json
        self._out = Console(highlight=False, soft_wrap=True)
        self._aside = Console(highlight=False, soft_wrap=True, stderr=as_json or not sys.stdout.isatty())

    def talk(self, lines: Iterable[str] | None = None) -> None:
        """Go on until the lines end, or one says so.

        Raises:
            DeviceLostError: nothing more can be answered.
        """
        from opsin.cli.chat.terminal import typed

        if sys.stdin.isatty():
            self._say("Ask, or /help. /image FILE shows a picture. Ctrl-D ends.")
        for line in typed(self._commands.names) if lines is None else lines:
            text = line.strip()
            if text in ("/exit", "/quit"):
                return
            try:
                self._take(text)
            except DeviceLostError:
                raise
            except OpsinError as error:
                self._say(f"opsin: {error}", "red")

    def _take(self, text: str) -> None:
        if text == "/retry":
            if not self._conversation.turns:
                raise OpsinError("there is no question to ask again")
            last = self._conversation.turns.pop()
            self._conversation.waiting[:0] = last.attached
            self._answer(last.text)
        elif text.startswith("/") and not text.startswith("//"):
            if said := self._commands.run(text):
                self._say(said)
        elif text:
            self._answer(text.removeprefix("/") if text.startswith("//") else text)

    def _answer(self, text: str) -> None:
        turn = self._conversation.ask(text)
        started = time.perf_counter()
        try:
            output, interrupted = self._streamed()
        except BaseException:
            self._conversation.forget(turn)
            raise
        if output is None:
            self._conversation.forget(turn)
            self._say("interrupted before the answer began; the question is taken back")
            return
        turn.answer = output.outputs[0].text
        self._closed(turn, output, interrupted, time.perf_counter() - started)

    def _streamed(self) -> tuple[RequestOutput | None, bool]:
        """The last output, and whether it was interrupted; shown while it is made."""
        from opsin.cli.chat.terminal import printable

        output, printed = None, 0
        stream = self._llm.stream_chat(self._conversation.messages(), self._conversation.params)
        try:
            for output in stream:
                answer = output.outputs[0].text
                if not self._as_json:
                    self._out.print(printable(answer[printed:]), end="", markup=False)
                printed = len(answer)
        except KeyboardInterrupt:
            return output, True
        finally:
            stream.close()  # type: ignore[attr-defined]
        return output, False

    def _closed(self, turn: Turn, output: RequestOutput, interrupted: bool, seconds: float) -> None:
        """What stands behind an answer."""
        answer = output.outputs[0]
        reason = "interrupted" if interrupted else answer.finish_reason
        used = len(output.prompt_token_ids) + len(answer.token_ids)
        if self._as_json:
            line = {
                "question": turn.text,
                "text": answer.text,
                "finish_reason": reason,
                "prompt_tokens": len(output.prompt_token_ids),
                "completion_tokens": len(answer.token_ids),
                "seconds": round(seconds, 3),
            }
            print(json.dumps(line, ensure_ascii=False), flush=True)
            return
        self._out.print()
        if sys.stdin.isatty():
            most = self._llm.engine.info.max_model_len
            cut = {"length": "cut at --max-tokens, ", "interrupted": "interrupted, "}.get(reason or "", "")
            self._say(f"{cut}{len(answer.token_ids)} tokens in {seconds:.1f} s, context {used:,} of {most:,}")

    def _say(self, text: str, style: str = "dim") -> None:
        self._aside.print(text, style=style, markup=False)
