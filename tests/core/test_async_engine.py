"""The engine on its own thread: many streams, cancellation, errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opsin import (
    AsyncEngine,
    EngineConfig,
    PoolingParams,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from opsin.api import ProcessedPrompt
from opsin.errors import OpsinError, RequestError

GOLDEN = Path(__file__).parents[1] / "golden"
MARK = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture
def engine() -> Iterator[AsyncEngine]:
    config = EngineConfig(model=str(GOLDEN / "qwen2vl" / "model"), dtype="float32", kv_cache_memory=2**23)
    running = AsyncEngine.from_config(config)
    yield running
    running.close()


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


async def collect(engine: AsyncEngine, prompt: object, max_tokens: int = 12) -> list[int]:
    """The tokens of a whole stream."""
    last = None
    async for output in engine.generate(prompt, params(max_tokens)):  # type: ignore[arg-type]
        last = output
    assert last is not None
    assert last.finished
    return last.outputs[0].token_ids


async def wait_idle(engine: AsyncEngine) -> None:
    """Until the engine's thread has nothing left."""
    while engine.engine.has_unfinished():
        await asyncio.sleep(0.01)


def test_streams_side_by_side_are_streams_alone(engine: AsyncEngine) -> None:
    picture = Image.open(GOLDEN / "images" / "cat_150x240.png")
    prompts: list[object] = ["Hello", "and you", {"prompt": MARK, "multi_modal_data": {"image": picture}}]

    async def main() -> None:
        alone = [await collect(engine, prompt) for prompt in prompts]
        together = await asyncio.gather(*(collect(engine, prompt) for prompt in prompts * 3))
        assert together == alone * 3

    asyncio.run(main())


def test_finished_only_is_the_end_of_the_stream(engine: AsyncEngine) -> None:
    async def main() -> None:
        whole = [output async for output in engine.generate("Hello", params(40), finished_only=True)]
        assert [output.finished for output in whole] == [True]
        assert whole[0].outputs[0].token_ids == await collect(engine, "Hello", 40)

    asyncio.run(main())


def test_leaving_a_stream_aborts_its_request(engine: AsyncEngine) -> None:
    async def main() -> None:
        stream = engine.generate("Hello", params(1500))
        async for output in stream:
            if len(output.outputs[0].token_ids) >= 3:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        await wait_idle(engine)
        assert engine.engine.stats().kv_blocks_used == 0

    asyncio.run(main())


def test_cancelled_tasks_abort_and_the_others_go_on(engine: AsyncEngine) -> None:
    async def main() -> None:
        expected = await collect(engine, "Hello", 40)
        tasks = [asyncio.create_task(collect(engine, "Hello", 1500)) for _ in range(4)]
        kept = asyncio.create_task(collect(engine, "Hello", 40))
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        assert await kept == expected
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await wait_idle(engine)
        assert engine.engine.stats().kv_blocks_used == 0

    asyncio.run(main())


def test_abort_gives_what_there_is(engine: AsyncEngine) -> None:
    async def main() -> None:
        last = None
        async for output in engine.generate("Hello", params(1500), request_id="mine"):
            last = output
            if len(output.outputs[0].token_ids) >= 3:  # whoever is slow does not see every number
                await engine.abort("mine")
        assert last is not None
        assert last.finished
        assert last.outputs[0].finish_reason == "abort"
        assert 3 <= len(last.outputs[0].token_ids) < 1500

    asyncio.run(main())


def test_bad_requests_raise_and_harm_nobody(engine: AsyncEngine) -> None:
    async def main() -> None:
        good = asyncio.create_task(collect(engine, "Hello", 40))
        with pytest.raises(RequestError):
            await collect(engine, {"prompt": MARK})
        with pytest.raises(RequestError):
            await collect(engine, [1] * 5000)
        assert len(await good) == 40

    asyncio.run(main())


def test_a_dead_engine_says_so_to_everyone(engine: AsyncEngine) -> None:
    def broken(step: object) -> object:
        raise OpsinError("the device is gone")

    async def main() -> None:
        engine.engine.runner.run = broken  # type: ignore[method-assign, assignment]
        with pytest.raises(OpsinError, match="gone"):
            await collect(engine, "Hello")
        with pytest.raises(OpsinError, match="stopped"):
            await collect(engine, "Hello")

    asyncio.run(main())


def test_a_closed_engine_refuses_what_comes_later(engine: AsyncEngine) -> None:
    async def main() -> None:
        engine.close()
        with pytest.raises(OpsinError, match="stopped"):
            await asyncio.wait_for(collect(engine, [1, 2, 3]), 10)
        with pytest.raises(OpsinError, match="stopped"):
            await asyncio.wait_for(engine.stats(), 10)

    asyncio.run(main())


@pytest.mark.parametrize("end", ["close", "death"])
def test_what_was_asked_for_while_the_engine_ends_is_refused(engine: AsyncEngine, end: str) -> None:
    """Commands that stand in the queue when the thread ends are answered, too."""
    blocked, going_on = threading.Event(), threading.Event()
    run = engine.engine.runner.run

    def stuck(step: Any) -> Any:
        blocked.set()
        assert going_on.wait(30)
        if end == "death":
            raise OpsinError("the device is gone")
        return run(step)

    engine.engine.runner.run = stuck  # type: ignore[method-assign]

    async def main() -> None:
        first = asyncio.create_task(collect(engine, [1, 2, 3], 1500))
        await asyncio.to_thread(blocked.wait, 30)
        closing = threading.Thread(target=engine.close) if end == "close" else None
        if closing is not None:
            closing.start()
            while engine._commands.qsize() < 1:
                await asyncio.sleep(0.01)
        late = asyncio.create_task(collect(engine, [4, 5, 6]))
        asked = asyncio.create_task(engine.stats())
        while engine._commands.qsize() < (3 if closing else 2):
            await asyncio.sleep(0.01)
        going_on.set()
        results = await asyncio.wait_for(
            asyncio.gather(first, late, asked, return_exceptions=True), timeout=30
        )
        assert all(isinstance(result, OpsinError) for result in results), results
        if closing is not None:
            closing.join()

    asyncio.run(main())


def test_a_request_that_cannot_be_added_ends_no_other(engine: AsyncEngine) -> None:
    async def main() -> None:
        good = asyncio.create_task(collect(engine, "Hello", 40))
        with pytest.raises(TypeError):
            await collect(engine, ProcessedPrompt(token_ids=None))  # type: ignore[arg-type]
        assert len(await good) == 40

    asyncio.run(main())


def test_stats_are_asked_for_between_steps(engine: AsyncEngine) -> None:
    async def main() -> None:
        running = asyncio.create_task(collect(engine, "Hello", 200))
        while (await engine.stats()).num_running == 0:
            await asyncio.sleep(0.001)
        await running
        assert (await engine.stats()).num_running == 0

    asyncio.run(main())


def test_kinds_of_output(engine: AsyncEngine) -> None:
    async def stream(kind: RequestOutputKind) -> list[RequestOutput]:
        wanted = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, output_kind=kind)
        return [output async for output in engine.generate("Hello", wanted)]

    async def main() -> None:
        whole = (await stream(RequestOutputKind.CUMULATIVE))[-1].outputs[0]
        new = [output.outputs[0] for output in await stream(RequestOutputKind.DELTA)]
        assert len(new) > 1
        assert [token for output in new for token in output.token_ids] == whole.token_ids
        assert "".join(output.text for output in new) == whole.text
        [only] = await stream(RequestOutputKind.FINAL_ONLY)
        assert only.outputs[0] == whole

    asyncio.run(main())


def test_prompts_are_truncated_where_they_are_processed(engine: AsyncEngine) -> None:
    ids = list(range(100, 120))
    wanted = SamplingParams(temperature=0, max_tokens=1, truncate_prompt_tokens=4)

    async def main() -> None:
        [output] = [output async for output in engine.generate(ids, wanted)]
        assert output.prompt_token_ids == ids[-4:]
        embedding = await engine.embed(ids, PoolingParams(truncate_prompt_tokens=3))
        assert list(embedding.prompt_token_ids) == ids[-3:]
        processed = await engine.process(ids)
        with pytest.raises(RequestError, match="here it is too late"):
            await anext(engine.generate(processed, wanted))

    asyncio.run(main())
