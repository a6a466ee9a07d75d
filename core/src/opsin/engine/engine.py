"""The engine: requests in, steps, outputs out. Synchronous and single-threaded; `AsyncEngine` wraps it."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass

from opsin.api import ModelSpec, Pooling, ProcessedPrompt
from opsin.checkpoint.files import Checkpoint, load
from opsin.config import EngineConfig, PoolingParams, SamplingParams
from opsin.engine.cache import BlockPool
from opsin.engine.executor import LocalExecutor
from opsin.engine.request import PoolingState, RequestState
from opsin.engine.runner import StepTokens
from opsin.engine.sampler import make_generator
from opsin.engine.scheduler import Scheduler, Step
from opsin.engine.sequence import SampledToken, Sequence
from opsin.engine.sizing import Resolved
from opsin.errors import ConfigError, RequestError
from opsin.inputs.frontend import build_frontend
from opsin.plugins import Plugins, load_plugins
from opsin.results import EngineStats, Output

_NO_SAMPLING = SamplingParams()

logger = logging.getLogger(__name__)


@dataclass
class _Request:
    """A request and its sequences, one per sample."""

    state: RequestState | PoolingState
    sequences: dict[int, Sequence]  # live ones, by sample index
    prompt_logprobs: list[SampledToken]  # of the prompt tokens described so far, from the second on

    def take_prompt_logprobs(self, first: int, tokens: list[SampledToken]) -> None:
        """Add what a step described, ``first`` being a token index; computing anew repeats some."""
        self.prompt_logprobs += tokens[len(self.prompt_logprobs) + 1 - first :]
        assert isinstance(self.state, RequestState)
        if len(self.prompt_logprobs) == len(self.state.prompt.token_ids) - 1:
            self.state.set_prompt_logprobs(self.prompt_logprobs)


class Engine:
    """Runs requests through one model on one device.

    `processor` turns prompts into what `add` takes and may be called from any thread; all other methods
    belong to one thread.
    """

    def __init__(self, config: EngineConfig, plugins: Plugins | None = None) -> None:
        """Load plugins, checkpoint, tokenizer and weights.

        Raises:
            MissingPluginError: no plugin has the model's architecture or the device.
            ConfigError, CheckpointError: see `LocalExecutor`.
        """
        self.config = config
        self.plugins = plugins if plugins is not None else load_plugins(prefer=config.prefer)
        self.checkpoint: Checkpoint = load(config.model, config.revision)
        self.model_spec: ModelSpec = self.plugins.model(self.checkpoint.architecture)
        if config.task not in self.model_spec.tasks:
            possible = ", ".join(self.model_spec.tasks)
            raise ConfigError(f"task={config.task!r}: {self.model_spec.architecture} can: {possible}")
        default = self.model_spec.pooling
        self.pooling = Pooling(
            type=config.pooling_type or default.type,
            normalize=default.normalize if config.normalize is None else config.normalize,
        )
        device_spec, device_index, _ = self.plugins.select_device(config.device)
        self.executor = LocalExecutor(
            config,
            self.checkpoint,
            model_spec=self.model_spec,
            device_spec=device_spec,
            device_index=device_index,
            kernel_specs=self.plugins.kernel_specs(device_spec.name),
        )
        self.resolved: Resolved = self.executor.resolved
        frontend = build_frontend(
            config,
            self.checkpoint,
            self.model_spec,
            self.plugins,
            max_model_len=self.resolved.max_model_len,
            vocab_size=self.executor.model.vocab_size,
            hidden_size=self.executor.model.hidden_size,
        )
        self.tokenizer = frontend.tokenizer
        self.processor, self.renderer = frontend.processor, frontend.renderer
        self.eos_token_ids, self.grammars = frontend.eos_token_ids, frontend.grammars
        self.scheduler = Scheduler(
            blocks=BlockPool(self.resolved.num_blocks),
            encoder_cache=self.executor.encoder_cache,
            block_size=self.resolved.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_encoder_tokens=config.max_encoder_tokens,
            embed_bytes=self.executor.embed_bytes,
            prefix_caching=config.enable_prefix_caching,
            root_key=f"{self.checkpoint.revision_key}|{self.resolved.dtype}".encode(),
        )
        self._requests: dict[str, _Request] = {}
        self._num_sequences = 0
        self._seeds = random.Random(config.seed) if config.seed is not None else random.SystemRandom()

    # ---- requests -----------------------------------------------------------------------------

    def default_params(self, **changes: object) -> SamplingParams:
        """Sampling defaults of the checkpoint (generation_config.json), overridden by ``changes``."""
        return SamplingParams.from_generation_config(self.checkpoint.generation_config, **changes)

    def add(self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams | PoolingParams) -> None:
        """Queue a request: ``params.n`` samples, or with `PoolingParams` one embedding.

        Raises:
            RequestError: the id is in use, or the prompt is not what this engine can run.
        """
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is already in use")
        length = len(prompt.token_ids)
        most = self.resolved.max_model_len - isinstance(params, SamplingParams)
        if not 0 < length <= most:
            raise RequestError(f"the prompt has {length} tokens; 1 to {most} are possible")
        if isinstance(params, SamplingParams) and params.priority and self.config.scheduling_policy == "fcfs":
            raise RequestError(
                f"priority={params.priority}: this engine serves first come, first served "
                "(scheduling_policy, --scheduling-policy priority)"
            )
        if isinstance(params, PoolingParams):
            self._add_pooling(request_id, prompt, params)
        else:
            self._add_sampling(request_id, prompt, params)

    def _add_pooling(self, request_id: str, prompt: ProcessedPrompt, params: PoolingParams) -> None:
        if "embed" not in self.model_spec.tasks:
            raise RequestError(
                f"{self.model_spec.architecture} makes no embeddings; it can: "
                f"{', '.join(self.model_spec.tasks)}"
            )
        width = self.executor.model.hidden_size
        if params.dimensions is not None and params.dimensions > width:
            raise RequestError(f"dimensions={params.dimensions}: this model's embeddings have {width}")
        sequence = Sequence(
            seq_id=self._num_sequences,
            request_id=request_id,
            index=0,
            prompt=prompt,
            params=_NO_SAMPLING,
            max_len=len(prompt.token_ids),
            pooling=self.pooling,
            dimensions=params.dimensions,
        )
        self._num_sequences += 1
        self.scheduler.add(sequence)
        state = PoolingState(request_id, prompt, time.monotonic())
        self._requests[request_id] = _Request(state, {0: sequence}, [])

    def _add_sampling(self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams) -> None:
        length = len(prompt.token_ids)
        most = self.resolved.max_model_len
        max_len = most if params.max_tokens is None else min(most, length + params.max_tokens)
        wanted = params.structured
        grammars = [None if wanted is None else self.grammars.compile(wanted) for _ in range(params.n)]
        state = RequestState(
            request_id=request_id,
            prompt=prompt,
            params=params,
            tokenizer=self.tokenizer,
            eos_token_ids=self.eos_token_ids,
            max_len=max_len,
            arrival_time=time.monotonic(),
        )
        sequences = {}
        for index in range(params.n):
            sequence = Sequence(
                seq_id=self._num_sequences,
                request_id=request_id,
                index=index,
                prompt=prompt,
                params=params,
                max_len=max_len,
                eos_token_ids=self.eos_token_ids,
                grammar=grammars[index],
                priority=params.priority,
            )
            if not params.greedy:
                seed = self._seeds.getrandbits(63) if params.seed is None else params.seed + index
                sequence.generator = make_generator(seed)
            self._num_sequences += 1
            sequences[index] = sequence
            self.scheduler.add(sequence)
        self._requests[request_id] = _Request(state, sequences, [])

    def abort(self, request_id: str) -> Output | None:
        """End a request now; returns what it has so far, None if the id is unknown (or done)."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for index in list(request.sequences):
            request.state.finish(index, "abort")
            self._drop(request, index)
        return self._close(request_id)

    def has_unfinished(self) -> bool:
        """Whether `step` has work to do."""
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun, or were pushed out."""
        return len(self.scheduler.waiting)

    # ---- a step -------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Compute one batch; returns the requests that changed, each with all it has so far.

        Raises:
            DeviceLostError: nothing can be computed any more.
        """
        started = time.monotonic()
        step = self.scheduler.schedule()
        tokens = self.executor.run(step)
        failed = [self._fail(step, seq_id, error) for seq_id, error in tokens.errors.items()]
        self.scheduler.commit(step, {seq_id: token.token_id for seq_id, token in tokens.sampled.items()})
        return [output for output in failed if output is not None] + self._deliver(step, tokens, started)

    def _deliver(self, step: Step, tokens: StepTokens, started: float) -> list[Output]:
        changed: dict[str, None] = {}
        for chunk in step.chunks:
            sequence = chunk.sequence
            request = self._requests.get(sequence.request_id)
            if request is None:
                continue
            if request.state.first_scheduled_time is None:
                request.state.first_scheduled_time = started
                request.state.num_cached_tokens = sequence.num_cached
            described = tokens.prompt_logprobs.get(sequence.seq_id)
            if described is not None:
                request.take_prompt_logprobs(*described)
            request.state.num_preemptions = max(request.state.num_preemptions, sequence.num_preemptions)
            embedding = tokens.embeddings.get(sequence.seq_id)
            if embedding is not None and isinstance(request.state, PoolingState):
                request.state.complete(embedding)
                self._drop(request, sequence.index)
                changed[sequence.request_id] = None
            token = tokens.sampled.get(sequence.seq_id)
            if token is None or not isinstance(request.state, RequestState):
                continue
            changed[sequence.request_id] = None
            if request.state.append(sequence.index, token) is not None:
                self._drop(request, sequence.index)
        return [self._output(request_id) for request_id in changed]

    def _fail(self, step: Step, seq_id: int, error: RequestError) -> Output | None:
        """Fail the request of one sequence, with its other samples."""
        request_id = next(c.sequence.request_id for c in step.chunks if c.sequence.seq_id == seq_id)
        request = self._requests.get(request_id)
        if request is None:  # another of its samples has failed already
            return None
        for index in list(request.sequences):
            self._drop(request, index)
        request.state.fail(error)
        return self._close(request_id)

    def _output(self, request_id: str) -> Output:
        request = self._requests[request_id]
        return request.state.output() if request.sequences else self._close(request_id)

    def _drop(self, request: _Request, index: int) -> None:
        self.scheduler.remove(request.sequences.pop(index))

    def _close(self, request_id: str) -> Output:
        return self._requests.pop(request_id).state.output()

    # ---- around -------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        blocks, encoder = self.scheduler.blocks, self.scheduler.encoder_cache
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            kv_blocks=blocks.num_blocks,
            kv_blocks_used=blocks.num_used,
            prefix_queries=blocks.queries,
            prefix_hits=blocks.hits,
            encoder_queries=encoder.queries,
            encoder_hits=encoder.hits,
            encoder_cache_bytes=encoder.used_bytes,
            num_encoded=self.executor.num_encoded,
            num_preemptions=self.scheduler.num_preemptions,
            num_restarts=self.scheduler.num_restarts,
        )

    def close(self) -> None:
        """Abort everything and let go of the model."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self.executor.close()
