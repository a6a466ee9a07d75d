"""The engine: requests in, steps, outputs out. Synchronous and single-threaded; `AsyncEngine` wraps it."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from opsin.api import ModelSpec, Pooling, ProcessedPrompt, Tokenizer
from opsin.checkpoint.files import Checkpoint, load, sampling_defaults
from opsin.config import EngineConfig
from opsin.engine.cache import BlockPool, EncoderCache
from opsin.engine.executor import open_executor
from opsin.engine.request import PoolingState, RequestState
from opsin.engine.runner import Runner, StepTokens
from opsin.engine.sampler import make_generator
from opsin.engine.scheduler import Scheduler, Step
from opsin.engine.sequence import Sequence
from opsin.engine.speculation import Drafter
from opsin.errors import ConfigError, RequestError
from opsin.inputs.frontend import build_frontend
from opsin.inputs.processor import PromptProcessor
from opsin.params import PoolingParams, SamplingParams
from opsin.plugins import Plugins, load_plugins
from opsin.rank.sizing import Resolved
from opsin.results import EngineStats, Output


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What is fixed once an engine is loaded. Safe to read from any thread.

    Attributes:
        config: the settings, as requested.
        max_model_len: most tokens of prompt and output together.
        vocab_size: token ids are below it.
        hidden_size: width of an embedding.
        generation_config: defaults of sampling, as in a generation_config.json.
        fingerprint: of what answers depend on besides the request: opsin's version, checkpoint, dtype, forms
            of weights, adapters.
    """

    config: EngineConfig
    max_model_len: int
    vocab_size: int
    hidden_size: int
    generation_config: Mapping[str, Any]
    fingerprint: str = ""

    def default_params(self, **changes: Any) -> SamplingParams:
        """Sampling defaults of the checkpoint, overridden by ``changes``."""
        return SamplingParams.from_generation_config(self.generation_config, **changes)


class Engine:
    """Runs requests through one model on one device.

    Attributes:
        frontend: turns prompts and conversations into what `add` takes. It and `info` may be used from any
            thread; all else belongs to one thread.
        info: what is fixed.
    """

    def __init__(self, config: EngineConfig, plugins: Plugins | None = None) -> None:
        """Load plugins, checkpoint, tokenizer and weights.

        Raises:
            MissingPluginError, ConfigError, CheckpointError: as `opsin.rank.local.Rank`.
            DeviceLostError: a rank ended while it started.
        """
        if plugins is not None and config.tensor_parallel_size > 1:
            raise ConfigError(
                "tensor_parallel_size: ranks are processes of their own, which load the plugins that are "
                "installed; leave plugins out"
            )
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
        generation_config = sampling_defaults(
            self.checkpoint, config.generation_config, config.override_generation_config
        )
        self.executor = open_executor(config, self.checkpoint, self.plugins)
        self.resolved: Resolved = self.executor.resolved
        encoder_cache = EncoderCache(config.encoder_cache_memory)
        self.runner = Runner(executor=self.executor, encoder_cache=encoder_cache)
        self.frontend = build_frontend(
            config,
            self.checkpoint,
            self.model_spec,
            self.plugins,
            max_model_len=self.resolved.max_model_len,
            vocab_size=self.executor.model.vocab_size,
            media_width=self.executor.media_width,
        )
        identity = (
            *(self.checkpoint.revision_key, self.resolved.dtype, str(self.executor.weight_forms)),
            *(str(config.lora), str(config.lora_scale)),
        )
        told = hashlib.blake2b("|".join((version("opsin"), *identity)).encode(), digest_size=6)
        self.info = EngineInfo(
            config=config,
            max_model_len=self.resolved.max_model_len,
            vocab_size=self.executor.model.vocab_size,
            hidden_size=self.executor.model.hidden_size,
            generation_config=generation_config,
            fingerprint=f"opsin_{told.hexdigest()}",
        )
        speculative = config.speculative
        self.drafter = None if speculative is None else Drafter(speculative, self.resolved.max_model_len)
        self.scheduler = Scheduler(
            blocks=BlockPool(self.resolved.num_blocks),
            encoder_cache=encoder_cache,
            block_size=self.resolved.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_encoder_tokens=config.max_encoder_tokens,
            embed_bytes=self.executor.media_width * self.executor.dtype.itemsize,
            prefix_caching=config.enable_prefix_caching,
            root_key="|".join(identity).encode(),
            drafter=self.drafter,
        )
        self._requests: dict[str, RequestState | PoolingState] = {}
        self._num_sequences = 0
        self._seeds = random.Random(config.seed) if config.seed is not None else random.SystemRandom()

    # ---- requests -----------------------------------------------------------------------------

    def add(self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams | PoolingParams) -> None:
        """Queue a request: ``params.n`` samples, or with `PoolingParams` one embedding.

        Raises:
            RequestError: the id is in use, or the prompt is not what this engine can run.
        """
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is already in use")
        length = len(prompt.token_ids)
        if 0 < (params.truncate_prompt_tokens or 0) < length:
            raise RequestError(
                "truncate_prompt_tokens: pass it to PromptProcessor.process; here it is too late"
            )
        most = self.resolved.max_model_len - isinstance(params, SamplingParams)
        if not 0 < length <= most:
            raise RequestError(f"the prompt has {length} tokens; expected 1 to {most}")
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
        width = self.info.hidden_size
        if params.dimensions is not None and params.dimensions > width:
            raise RequestError(f"dimensions={params.dimensions}: this model's embeddings have {width}")
        request = PoolingState(request_id, prompt, time.monotonic())
        sequence = Sequence(
            seq_id=self._num_sequences,
            request_id=request_id,
            index=0,
            prompt=prompt,
            params=SamplingParams(),
            pooling=self.pooling,
            dimensions=params.dimensions,
        )
        self._queue(request, sequence)

    def _add_sampling(self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams) -> None:
        if params.priority and self.config.scheduling_policy == "fcfs":
            raise RequestError(
                f"priority={params.priority}: this engine serves first come, first served; "
                "set scheduling_policy (--scheduling-policy) to priority"
            )
        params = params.clone()  # the caller may assign to it
        wanted = params.structured
        grammars = [
            None if wanted is None else self.frontend.grammars.compile(wanted) for _ in range(params.n)
        ]
        request = RequestState(
            request_id=request_id,
            prompt=prompt,
            params=params,
            tokenizer=self.frontend.tokenizer,
            eos_token_ids=self.frontend.eos_token_ids,
            max_len=self.resolved.max_model_len,
            arrival_time=time.monotonic(),
        )
        bad_words = self._ids_of_words(params.bad_words or ())
        for index, grammar in enumerate(grammars):
            sequence = Sequence(
                seq_id=self._num_sequences,
                request_id=request_id,
                index=index,
                prompt=prompt,
                params=params,
                eos_token_ids=self.frontend.eos_token_ids,
                grammar=grammar,
                bad_words=bad_words,
            )
            if not params.greedy:
                seed = self._seeds.getrandbits(63) if params.seed is None else params.seed + index
                sequence.generator = make_generator(seed)
            self._queue(request, sequence)

    def _ids_of_words(self, words: SequenceOf[str]) -> list[list[int]]:
        """Words as they are tokenized at the start of a text and after a space."""
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        found: list[list[int]] = []
        for word in words:
            bare, spaced = encode(word.lstrip()), encode(f" {word.lstrip()}")
            found += [bare, spaced] if len(bare) == len(spaced) and bare[0] != spaced[0] else [bare]
        return found

    def _queue(self, request: RequestState | PoolingState, sequence: Sequence) -> None:
        self._num_sequences += 1
        self._requests[request.request_id] = request
        request.sequences[sequence.index] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> Output | None:
        """End a request now. Returns what it has so far, or None if the id is unknown or the request done."""
        return self._stop(request_id) if request_id in self._requests else None

    def _stop(self, request_id: str, error: RequestError | None = None) -> Output:
        """End a request with all its samples: aborted, or with an error."""
        request = self._requests[request_id]
        for index in list(request.sequences):
            self._drop(request, index)
        request.stop(error)
        return self._output(request_id)

    @property
    def tokenizer(self) -> Tokenizer:
        """The frontend's."""
        return self.frontend.tokenizer

    @property
    def processor(self) -> PromptProcessor:
        """The frontend's, which turns prompts into what `add` takes."""
        return self.frontend.processor

    def default_params(self, **changes: object) -> SamplingParams:
        """See `EngineInfo.default_params`."""
        return self.info.default_params(**changes)

    def has_unfinished(self) -> bool:
        """Whether `step` has work to do."""
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        """Sequences that have not begun, or were preempted."""
        return len(self.scheduler.waiting)

    # ---- a step -------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Compute one batch; returns the requests that changed, each with all it has so far.

        Raises:
            DeviceLostError: nothing more can be computed.
        """
        started = time.monotonic()
        step = self.scheduler.schedule()
        tokens = self.runner.run(step)
        failed = self._fail(step, tokens.errors)
        self.scheduler.commit(
            step, {seq_id: [token.token_id for token in run] for seq_id, run in tokens.sampled.items()}
        )
        return failed + self._deliver(step, tokens, started)

    def _fail(self, step: Step, errors: Mapping[int, RequestError]) -> list[Output]:
        """Fail the requests of sequences that could not be computed, with their other samples."""
        sequences = [chunk.sequence for chunk in step.chunks if chunk.sequence.seq_id in errors]
        failed = {sequence.request_id: errors[sequence.seq_id] for sequence in sequences}
        return [self._stop(request_id, error) for request_id, error in failed.items()]

    def _deliver(self, step: Step, tokens: StepTokens, started: float) -> list[Output]:
        changed: dict[str, None] = {}
        for chunk in step.chunks:
            sequence = chunk.sequence
            request = self._requests.get(sequence.request_id)
            if request is None:
                continue
            request.computed(sequence, started)
            if isinstance(request, PoolingState):
                embedding = tokens.embeddings.get(sequence.seq_id)
                if embedding is not None:
                    request.complete(embedding)
                    self._drop(request, sequence.index)
                    changed[sequence.request_id] = None
                continue
            described = tokens.prompt_logprobs.get(sequence.seq_id)
            if described is not None:
                request.describe_prompt(*described)
            for token in tokens.sampled.get(sequence.seq_id, ()):
                changed[sequence.request_id] = None
                if request.append(sequence.index, token) is not None:
                    self._drop(request, sequence.index)
                    break
        return [self._output(request_id) for request_id in changed]

    def _output(self, request_id: str) -> Output:
        """A request's output; the request is forgotten with its last sample."""
        request = self._requests[request_id]
        if not request.sequences:
            del self._requests[request_id]
        return request.output()

    def _drop(self, request: RequestState | PoolingState, index: int) -> None:
        self.scheduler.remove(request.sequences.pop(index))

    # ---- around -------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters and gauges of this moment."""
        blocks, encoder = self.scheduler.blocks, self.scheduler.encoder_cache
        media, drafter = self.frontend.processor.mapped_media, self.drafter
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=self.num_waiting,
            kv_blocks=blocks.num_blocks,
            kv_blocks_used=blocks.num_used,
            prefix_queries=blocks.queries,
            prefix_hits=blocks.hits,
            encoder_queries=encoder.queries,
            encoder_hits=encoder.hits,
            encoder_cache_bytes=encoder.used_bytes,
            media_queries=media.queries,
            media_hits=media.hits,
            media_cache_bytes=media.num_bytes,
            num_encoded=self.runner.num_encoded,
            num_preemptions=self.scheduler.num_preemptions,
            num_restarts=self.scheduler.num_restarts,
            spec_decode_num_drafts=0 if drafter is None else drafter.num_drafts,
            spec_decode_num_draft_tokens=0 if drafter is None else drafter.num_draft_tokens,
            spec_decode_num_accepted_tokens=0 if drafter is None else drafter.num_accepted,
            spec_decode_num_accepted_tokens_per_pos=tuple(drafter.num_accepted_per_pos) if drafter else (),
            weight_forms=self.executor.weight_forms,
        )

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. False, and nothing is forgotten, while sequences hold some."""
        return self.scheduler.blocks.reset()

    def close(self) -> None:
        """Abort everything and release the model. May be called again."""
        for request_id in list(self._requests):
            self.abort(request_id)
        vars(self).pop("runner", None)
        self.executor.close()
