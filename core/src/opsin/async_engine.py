"""`Engine` on a thread of its own, for asyncio: streams, cancellation, media work off the loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any, NamedTuple, TypeVar

from opsin.api import ProcessedPrompt
from opsin.config import EngineConfig
from opsin.engine.beam import BeamSearch
from opsin.engine.engine import Engine
from opsin.errors import OpsinError, RequestError
from opsin.inputs.prompt import PromptInput
from opsin.params import BeamSearchParams, PoolingParams, RequestOutputKind, SamplingParams
from opsin.plugins import Plugins
from opsin.results import BeamSearchOutput, EngineStats, Output, PoolingRequestOutput, RequestOutput

T = TypeVar("T")

logger = logging.getLogger(__name__)

_ROOM_WAIT_S = 0.005
"""How often a thread that prepares media looks whether there is room for them."""

_Params = SamplingParams | PoolingParams
_Result = Output | BaseException


class _Stream:
    """Carries one request's outputs from the engine's thread to its consumer's event loop.

    Each output holds all there is so far, so only the latest is kept: a slow consumer costs no memory.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, finished_only: bool) -> None:
        self.loop = loop
        self.finished_only = finished_only
        self._latest: _Result | None = None
        self._ready = asyncio.Event()

    def set(self, result: _Result) -> None:
        """Called on the loop."""
        self._latest = result
        self._ready.set()

    async def get(self) -> Output:
        """Wait for an output that was not taken yet; raises an exception that came instead."""
        await self._ready.wait()
        self._ready.clear()
        result = self._latest
        assert result is not None, "ready means there is one"
        if isinstance(result, BaseException):
            raise result
        return result


def _hand_over(results: Sequence[tuple[_Stream, _Result]]) -> None:
    """Give streams their results; called on the engine's thread. Waking up a loop costs a system call, and
    the interpreter's lock twice, so each loop is woken once, not once per stream."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, _Result]]] = {}
    for stream, result in results:
        by_loop.setdefault(stream.loop, []).append((stream, result))
    for loop, its_results in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_all, its_results)
        except RuntimeError:  # the consumers' loop is closed: nobody listens
            logger.debug("outputs came after their event loop had closed")


def _set_all(results: Sequence[tuple[_Stream, _Result]]) -> None:
    for stream, result in results:
        stream.set(result)


class _Command(NamedTuple):
    """Work for the engine's thread, and what to do instead when the thread ends."""

    run: Callable[[], None]
    refuse: Callable[[BaseException], object]


class AsyncEngine:
    """Runs an `Engine` on its own thread; any number of coroutines stream from it.

    All engine state belongs to that thread, which takes commands from a queue.

    Attributes:
        frontend, info: the engine's, usable from any thread.
        engine: belongs to its thread; other threads use `frontend`, `info` and the methods here.
        death: what ended the engine's thread; None while it runs.
    """

    def __init__(self, engine: Engine) -> None:
        self.frontend, self.info = engine.frontend, engine.info
        self.engine = engine
        threads = engine.config.preprocess_threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="opsin-inputs")
        self._media_pool = ThreadPoolExecutor(threads, thread_name_prefix="opsin-media")
        # One thread: who sends one large schema after another makes only others with schemas wait.
        self._grammar_pool = ThreadPoolExecutor(1, thread_name_prefix="opsin-grammar")
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._submitting = threading.Lock()  # between looking at `death` and putting a command
        self._streams: dict[str, _Stream] = {}
        self._ids = itertools.count()
        # An idle engine looks every now and then whether its other ranks are still there.
        self._look_s = 1.0 if engine.config.tensor_parallel_size > 1 else None
        self.death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="opsin-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_config(cls, config: EngineConfig, plugins: Plugins | None = None) -> AsyncEngine:
        """Load a model and start the thread."""
        return cls(Engine(config, plugins))

    async def process(
        self, prompt: PromptInput, *, min_new_tokens: int = 1, truncate: int | None = None
    ) -> ProcessedPrompt:
        """Decode, map and tokenize a prompt in the pool; the event loop stays free.

        The arguments are those of `PromptProcessor.process`.

        Raises:
            RequestError: the prompt cannot be used.
        """
        has_media = isinstance(prompt, Mapping) and prompt.get("multi_modal_data")
        run = self.prepare if has_media else self.in_pool
        process = self.frontend.processor.process
        return await run(process, prompt, min_new_tokens=min_new_tokens, truncate=truncate)

    async def prepare(
        self, work: Callable[..., ProcessedPrompt], *args: Any, **kwargs: Any
    ) -> ProcessedPrompt:
        """Run work that makes a prompt with media, in a bounded pool of its own.

        It waits there until the media of requests that are not answered yet leave room.

        Raises:
            OpsinError: the engine has stopped; or whatever the work raises.
        """
        held = self.frontend.processor.held_media

        def job() -> ProcessedPrompt:
            idle_s = 0.0
            while not held.has_room() and idle_s < 1:  # an idle engine will not make room
                time.sleep(_ROOM_WAIT_S)
                idle_s = 0 if self._streams else idle_s + _ROOM_WAIT_S
            self._check_running()
            return work(*args, **kwargs)

        self._check_running()
        return await asyncio.get_running_loop().run_in_executor(self._media_pool, job)

    async def in_pool(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run blocking media work in the bounded pool.

        Raises:
            OpsinError: the engine has stopped; or whatever the work raises.
        """
        return await self._in(self._pool, work, *args, **kwargs)

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        def job() -> T:
            self._check_running()
            return work(*args, **kwargs)

        self._check_running()
        return await asyncio.get_running_loop().run_in_executor(pool, job)

    async def generate(
        self,
        prompt: PromptInput | ProcessedPrompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        finished_only: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream a request's outputs, each with what `SamplingParams.output_kind` says.

        A slow consumer skips intermediate outputs (and gets what was new in them with the next one); with
        ``finished_only`` there is only the last one. Leaving the iteration early (a break, a cancelled task,
        a closed client) aborts the request.

        Raises:
            RequestError: this request cannot be served.
            OpsinError: the engine has stopped, or was closed.
        """
        params = params or self.info.default_params()
        if not isinstance(prompt, ProcessedPrompt):
            prompt = await self.process(prompt, truncate=params.truncate_prompt_tokens)
        kind, earlier = params.output_kind, None
        finished_only = finished_only or kind is RequestOutputKind.FINAL_ONLY
        if (
            params.structured is not None
        ):  # compiled here, not on the engine's thread, which all requests share
            await self._in(self._grammar_pool, self.frontend.grammars.compile, params.structured)
        # Closed together with this generator, not at garbage collection: closing is what aborts the request.
        async with aclosing(self._outputs(prompt, params, request_id, finished_only)) as outputs:
            async for output in outputs:
                assert isinstance(output, RequestOutput)
                yield output.since(earlier) if kind is RequestOutputKind.DELTA else output
                earlier = output

    async def embed(
        self,
        prompt: PromptInput | ProcessedPrompt,
        params: PoolingParams | None = None,
        request_id: str | None = None,
    ) -> PoolingRequestOutput:
        """A prompt's embedding. Cancelling the task aborts the request.

        Raises:
            RequestError, OpsinError: as in `generate`.
        """
        params = params or PoolingParams()
        if not isinstance(prompt, ProcessedPrompt):
            prompt = await self.process(prompt, min_new_tokens=0, truncate=params.truncate_prompt_tokens)
        output = await self._last(prompt, params, request_id)
        assert isinstance(output, PoolingRequestOutput)
        return output

    async def beam_search(
        self, prompt: ProcessedPrompt, params: BeamSearchParams, request_id: str | None = None
    ) -> BeamSearchOutput:
        """The most probable continuations of a prompt, computed alongside whatever else runs.

        Raises:
            RequestError, OpsinError: as in `generate`.
        """
        request_id = request_id if request_id is not None else f"async-{next(self._ids)}"
        search = BeamSearch(prompt, params, self.frontend.eos_token_ids, self.info.max_model_len)
        goes_on, round_numbers = True, itertools.count()
        while goes_on:
            name = f"{request_id}-{next(round_numbers)}"
            tasks = [
                asyncio.ensure_future(self._last(continued, search.one_token, f"{name}-{index}"))
                for index, continued in enumerate(search.prompts())
            ]
            try:
                for index, output in enumerate(await asyncio.gather(*tasks)):
                    assert isinstance(output, RequestOutput)
                    goes_on = search.take(index, output)
            finally:
                for task in tasks:
                    task.cancel()
        return search.output(self.frontend.tokenizer)

    async def _last(self, prompt: ProcessedPrompt, params: _Params, request_id: str | None) -> Output:
        async with aclosing(self._outputs(prompt, params, request_id, finished_only=True)) as outputs:
            return await anext(outputs)

    async def _outputs(
        self, prompt: ProcessedPrompt, params: _Params, request_id: str | None, finished_only: bool
    ) -> AsyncGenerator[Output, None]:
        request_id = request_id if request_id is not None else f"async-{next(self._ids)}"
        stream = _Stream(asyncio.get_running_loop(), finished_only)
        self._submit(
            run=lambda: self._add(request_id, prompt, params, stream),
            refuse=lambda error: _hand_over([(stream, error)]),
        )
        finished = False
        try:
            while not finished:
                output = await stream.get()
                finished = output.finished
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            if not finished:
                with suppress(OpsinError):  # an engine that has stopped has nothing to abort
                    await self.abort(request_id)

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with what there is."""
        self._submit(run=lambda: self._abort(request_id), refuse=lambda _: None)

    async def stats(self) -> EngineStats:
        """The engine's counters between two steps.

        Raises:
            OpsinError: the engine has stopped.
        """
        future: Future[EngineStats] = Future()

        def answer() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(self.engine.stats())

        self._submit(run=answer, refuse=future.set_exception)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Stop the thread, aborting what runs."""
        self._commands.put(None)
        self._thread.join()
        for pool in (self._pool, self._media_pool, self._grammar_pool):
            pool.shutdown()  # what is queued is refused

    # ---- on the engine's thread ---------------------------------------------------------------

    def _submit(self, run: Callable[[], None], refuse: Callable[[BaseException], object]) -> None:
        with self._submitting:
            self._check_running()
            self._commands.put(_Command(run, refuse))

    def _check_running(self) -> None:
        if self.death is not None:
            raise OpsinError("the engine has stopped; restart the process") from self.death

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self.engine.has_unfinished():
                    self._deliver(self.engine.step())
            self._end(OpsinError("the engine was closed"))
        except BaseException as error:
            logger.exception("the engine's thread died")
            self._end(error)

    def _take_commands(self) -> bool:
        """Run the commands that have come; wait for one if there is no other work. False: stop."""
        while True:
            try:
                idle = not self.engine.has_unfinished()
                command = self._commands.get(block=idle, timeout=self._look_s)
            except queue.Empty:
                if not idle:
                    return True
                self.engine.executor.check()
                continue
            if command is None:
                return False
            command.run()

    def _add(self, request_id: str, prompt: ProcessedPrompt, params: _Params, stream: _Stream) -> None:
        try:
            self.engine.add(request_id, prompt, params)
        except Exception as error:  # whatever is wrong with one request ends no other
            if not isinstance(error, RequestError):
                logger.exception("request %s could not be added", request_id)
            _hand_over([(stream, error)])
        else:
            self._streams[request_id] = stream

    def _abort(self, request_id: str) -> None:
        output = self.engine.abort(request_id)
        if output is not None:
            self._deliver([output])

    def _deliver(self, outputs: Sequence[Output]) -> None:
        results: list[tuple[_Stream, _Result]] = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None and (output.finished or not stream.finished_only):
                results.append((stream, output))
            if output.finished:
                self._streams.pop(output.request_id, None)
        _hand_over(results)

    def _end(self, error: BaseException) -> None:
        with self._submitting:
            self.death = error
        _hand_over([(stream, error) for stream in self._streams.values()])
        self._streams.clear()
        while not self._commands.empty():  # the last ones: no more are accepted
            command = self._commands.get()
            if command is not None:
                command.refuse(error)
        self.engine.close()
