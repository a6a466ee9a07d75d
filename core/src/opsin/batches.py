"""Batches and streams on the caller's thread: prompts are prepared ahead, added, and taken as they finish."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from opsin.api import ProcessedPrompt
from opsin.engine.engine import Engine
from opsin.errors import BatchInterrupted, ConfigError, OpsinError, RequestError, RequestsFailed
from opsin.fetch.library import fetched
from opsin.fetch.settings import FetchSettings
from opsin.inputs.chat import ChatOptions
from opsin.inputs.feed import Feed
from opsin.params import PoolingParams, RequestOutputKind, SamplingParams
from opsin.results import FailedOutputs, Output, PoolingRequestOutput, RequestMetrics, RequestOutput

OnError = Literal["raise", "return"]
Progress = bool | Callable[..., Any]
"""Whether to show progress; or what to show it with, called like `tqdm.tqdm`."""

Params = SamplingParams | PoolingParams

_FILL_WAIT_S = 0.05
"""How long a batch with room waits for prompts in preparation before it starts without them."""


class Prepared(NamedTuple):
    """A prompt, or why it cannot be used, and its parameters."""

    prompt: ProcessedPrompt | RequestError
    params: Params


Job = Callable[[], Prepared]
"""Prepares one prompt, in any thread."""


class Batches:
    """Runs batches and streams through an engine. Calls may be nested in an iteration over another's results.

    Args:
        engine: that nobody else steps.
        fetch: how http(s) URLs in conversations are fetched; None: they are not.
    """

    def __init__(self, engine: Engine, fetch: FetchSettings | None = None) -> None:
        self.engine, self._fetch = engine, fetch
        self._ids = itertools.count()
        self._receivers: dict[str, Callable[[Output], object]] = {}

    def run(
        self,
        prompts: Iterable[Any],
        params: Iterable[Params],
        options: ChatOptions | None = None,
        *,
        progress: Progress,
        on_error: OnError,
    ) -> list[Output]:
        """Outputs of prompts, or with ``options`` conversations, in their order; see `opsin.LLM.generate`."""
        found: dict[int, Output] = {}
        bar = progress if callable(progress) else partial(tqdm, disable=not progress)
        total = len(prompts) if isinstance(prompts, Sized) else None
        num_tokens, started = 0, time.monotonic()
        try:
            with bar(total=total, desc="answers", unit="req") as shown:
                for index, output in self.iterate(prompts, params, options):
                    found[index] = output
                    num_tokens += _num_tokens(output)
                    shown.update()
                    speed = num_tokens / max(time.monotonic() - started, 1e-9)
                    shown.set_postfix_str(f"{speed:.1f} tok/s", refresh=False)
        except KeyboardInterrupt:
            raise BatchInterrupted(
                f"interrupted; the {len(found)} finished outputs are in this error's .outputs", found
            ) from None
        outputs = [found[index] for index in sorted(found)]
        if on_error == "raise":
            _raise_failures(outputs)
        return outputs

    def iterate(
        self, prompts: Iterable[Any], params: Iterable[Params], options: ChatOptions | None = None
    ) -> Iterator[tuple[int, Output]]:
        """The same with their numbers, as they finish; see `opsin.LLM.generate_iter`."""
        return self._finished(self._jobs(prompts, params, options))

    def stream(
        self, prompt: Any, params: SamplingParams, options: ChatOptions | None = None
    ) -> Iterator[RequestOutput]:
        """Prepare one prompt now, and give its outputs as it proceeds; see `opsin.LLM.stream`."""
        processed = self._prepare(prompt, params, options).prompt
        if isinstance(processed, RequestError):
            raise processed
        return self._streamed(processed, params)

    def _streamed(self, prompt: ProcessedPrompt, params: SamplingParams) -> Iterator[RequestOutput]:
        request_id, latest = f"stream-{next(self._ids)}", deque[Output](maxlen=1)
        self._receivers[request_id] = latest.append
        earlier: RequestOutput | None = None
        try:
            self.engine.add(request_id, prompt, params)
            while earlier is None or not earlier.finished:
                if not latest:
                    self.step()
                    continue
                output = latest.popleft()
                assert isinstance(output, RequestOutput)
                if output.error is not None:
                    raise output.error
                if output.finished or params.output_kind is not RequestOutputKind.FINAL_ONLY:
                    yield output.since(earlier) if params.output_kind is RequestOutputKind.DELTA else output
                earlier = output
        finally:
            del self._receivers[request_id]
            self.engine.abort(request_id)

    def step(self) -> Sequence[Output]:
        """Compute a step, and give each output to whoever has asked for it."""
        with _uninterrupted():
            outputs = self.engine.step()
            for output in outputs:
                if receive := self._receivers.get(output.request_id):
                    receive(output)
        return outputs

    def _jobs(
        self, prompts: Iterable[Any], params: Iterable[Params], options: ChatOptions | None = None
    ) -> Iterator[Job]:
        """What prepares each prompt, or with ``options`` each conversation."""
        rest = iter(params)
        for number, prompt in enumerate(prompts):
            own = next(rest, None)
            if own is None:
                raise ConfigError(f"there are parameters for {number} prompts, and more prompts than that")
            if not isinstance(own, (SamplingParams, PoolingParams)):
                raise ConfigError(f"got a {type(own).__name__} as parameters of prompt {number}")
            yield partial(self._prepare, prompt, own, options)

    def _prepare(self, prompt: Any, params: Params, options: ChatOptions | None) -> Prepared:
        frontend = self.engine.frontend
        try:
            if options is not None:
                conversation = frontend.conversation(prompt)
                if self._fetch is not None:
                    conversation = fetched(conversation, self._fetch)
                prompt = frontend.renderer.render(conversation, options)
            processed = frontend.processor.process(
                prompt,
                min_new_tokens=int(isinstance(params, SamplingParams)),
                truncate=params.truncate_prompt_tokens,
            )
        except RequestError as error:
            return Prepared(error, params)
        return Prepared(processed, params)

    def _finished(self, jobs: Iterator[Job]) -> Iterator[tuple[int, Output]]:
        """Run jobs, and yield each one's number with its output as they finish."""
        batch, config = next(self._ids), self.engine.config
        feed = Feed(
            jobs,
            num_threads=config.preprocess_threads,
            ahead=2 * config.max_num_seqs,
            has_room=self.engine.frontend.processor.held_media.has_room,
        )
        running: dict[str, int] = {}
        finished: deque[Output] = deque()

        def take(output: Output) -> None:
            if output.finished:
                finished.append(output)

        def taken() -> Iterator[tuple[int, Output]]:
            while finished:
                output = finished.popleft()
                del self._receivers[output.request_id]
                yield running.pop(output.request_id), output

        try:
            while feed or running:
                yield from taken()
                yield from self._add_ready(feed, batch, running, take)
                if running and not finished:  # a call from within the iteration may have finished some
                    if not self.engine.has_unfinished():
                        raise OpsinError(f"{len(running)} requests were aborted through LLM.engine")
                    self.step()
        except KeyboardInterrupt:
            yield from taken()
            raise
        finally:
            feed.close()
            for request_id in running:  # the iteration was left early
                del self._receivers[request_id]
                self.engine.abort(request_id)

    def _add_ready(
        self, feed: Feed[Prepared], batch: int, running: dict[str, int], take: Callable[[Output], None]
    ) -> Iterator[tuple[int, Output]]:
        """Add the prompts that are prepared, in order; yields outputs of those that cannot be used."""
        room = self.engine.config.max_num_batched_tokens
        while feed and self.engine.num_waiting < self.engine.config.max_num_seqs:
            # An idle engine has to wait. One whose next batch is full does not. Any other waits briefly: one
            # more prompt in a batch is cheaper than one more batch.
            busy = self.engine.has_unfinished()
            if busy and room <= 0:
                break
            ready = feed.take(_FILL_WAIT_S if busy else None)
            if ready is None:
                break
            index, future = ready
            request_id = f"{batch}-{index}"
            prompt, params = future.result()
            try:
                if isinstance(prompt, RequestError):
                    raise prompt
                self.engine.add(request_id, prompt, params)
            except RequestError as error:
                yield index, _refused(request_id, error, params)
            else:
                room -= len(prompt.token_ids)
                running[request_id] = index
                self._receivers[request_id] = take


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let the first Ctrl-C wait for the end of a step: one that is cut off leaves caches half filled."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = False

    def note(*_: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def _num_tokens(output: Output) -> int:
    if isinstance(output, RequestOutput):
        return sum(len(sample.token_ids) for sample in output.outputs)
    return len(output.prompt_token_ids)


def _refused(request_id: str, error: RequestError, params: Params) -> Output:
    """The output of a prompt that never reached the engine."""
    metrics = RequestMetrics(time.monotonic())
    if isinstance(params, PoolingParams):
        return PoolingRequestOutput(request_id, None, [], None, True, metrics, error)
    return RequestOutput(request_id, None, [], None, FailedOutputs(error), True, metrics, error)


def _raise_failures(outputs: Sequence[Output]) -> None:
    failures = [(index, output.error) for index, output in enumerate(outputs) if output.error is not None]
    if failures and len(outputs) == 1:
        raise failures[0][1]
    if failures:
        lines = "\n".join(f"  request {index}: {error}" for index, error in failures)
        raise RequestsFailed(
            f"{len(failures)} of {len(outputs)} requests failed; the others are in this error's .outputs "
            f'(or pass on_error="return"):\n{lines}',
            outputs,
        )
