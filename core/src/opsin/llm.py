"""`LLM`: the offline door. Batches of prompts or conversations in, finished outputs back in order."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, cast

from tqdm import tqdm

from opsin.api import ProcessedPrompt, Tokenizer
from opsin.config import BeamSearchParams, EngineConfig, PoolingParams, SamplingParams, parameters_of
from opsin.engine.beam import beam_search
from opsin.engine.engine import Engine
from opsin.errors import ConfigError, RequestError, RequestsFailed, require_known
from opsin.inputs.chat import ChatOptions, Tool
from opsin.inputs.feed import Feed
from opsin.inputs.prompt import PromptInput
from opsin.plugins import Plugins
from opsin.results import BeamSearchOutput, Output, PoolingRequestOutput, RequestMetrics, RequestOutput

Message = Mapping[str, Any]
OnError = Literal["raise", "return"]

P = TypeVar("P", SamplingParams, PoolingParams)

_FILL_WAIT_S = 0.05
"""How long a batch with room waits for prompts in preparation before it starts without them."""


def _signature() -> inspect.Signature:
    """`LLM`'s: `model`, ``plugins``, and the other fields of `EngineConfig`."""
    own = inspect.Parameter(
        "plugins", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Plugins | None
    )
    model, *settings = parameters_of(EngineConfig)
    local = [p.replace(default=True) if p.name == "local_media" else p for p in settings]
    return inspect.Signature([model, own, *local])


class LLM:
    """A vision-language model, ready to answer.

    Example:
        >>> llm = LLM("path/to/checkpoint")
        >>> question = {"type": "text", "text": "What colour is the circle?"}
        >>> picture = {"type": "image_pil", "image_pil": PIL.Image.open("circle.png")}
        >>> llm.chat([{"role": "user", "content": [picture, question]}])[0].outputs[0].text
        'The circle is red.'
    """

    __signature__ = _signature()

    def __init__(self, model: str, *, plugins: Plugins | None = None, **settings: Any) -> None:
        """Load a model.

        Args:
            model: a folder, the name of an installed checkpoint (``opsin plugins`` lists them) or a hub id.
            plugins: already loaded plugins. Default: those installed.
            settings: fields of `EngineConfig`; `help(EngineConfig)` describes them.

        Raises:
            ConfigError: a setting is unknown or impossible.
            MissingPluginError: no plugin provides the model's architecture or the device.
            CheckpointError: the checkpoint cannot be found or is not complete.
        """
        require_known("LLM", settings, EngineConfig.__dataclass_fields__, ConfigError)
        # The caller is this machine's user, who may read its files anyway.
        config = EngineConfig(**{"model": str(model), "local_media": True, **settings})
        self.engine = Engine(config, plugins)
        self._ids = itertools.count()

    # ---- batches ------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Answer prompts as one batch.

        Args:
            prompts: one or a list; see `opsin.inputs.prompt.PromptInput`.
            sampling_params: for all, or one each; None: the checkpoint's generation_config.
            use_tqdm: show progress.
            on_error: ``"raise"``: if requests failed, raise `RequestsFailed` once all others are done
                (a single prompt raises its own error). ``"return"``: return their outputs with ``error`` set.

        Returns:
            Outputs in the order of the prompts.
        """
        process = self.engine.frontend.processor.process
        jobs = [partial(process, prompt) for prompt in _listed(prompts)]
        params = self._params_for(len(jobs), sampling_params)
        return cast(list[RequestOutput], self._run(jobs, params, use_tqdm, on_error))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        on_error: OnError = "raise",
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Tool] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
        **misspelt: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them as one batch.

        Args:
            messages: OpenAI-style messages; content parts as in `opsin.inputs.conversation`: ``text``,
                ``image_url`` (``data:`` URLs), ``image_pil``, ``video`` and more.
            sampling_params: as in `generate`.
            use_tqdm: as in `generate`.
            on_error: as in `generate`.
            add_generation_prompt: end with the assistant's header; None: unless ``continue_final_message``.
            continue_final_message: leave the last message open, for the model to go on with.
            tools: that the model may call, as in OpenAI's API; calls are part of the answer's text, in the
                form the family was trained with.
            chat_template: Jinja text to use instead of the model's.
            chat_template_kwargs: further variables of the template.
            mm_processor_kwargs: as in a prompt's dict.
            cache_salt: as in a prompt's dict.
            misspelt: names that are no parameters; each is an error.

        Raises:
            ConfigError: there is no such parameter.
        """
        # Python's own TypeError does not say what was meant.
        known = [name for name in inspect.signature(LLM.chat).parameters if name not in ("self", "misspelt")]
        require_known("LLM.chat", misspelt, known, ConfigError)
        one = bool(messages) and isinstance(messages[0], Mapping)
        many = cast(Sequence[Sequence[Message]], [messages] if one else messages)
        options = ChatOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
            cache_salt=cache_salt,
        )
        jobs = [partial(self._process_chat, conversation, options) for conversation in many]
        params = self._params_for(len(jobs), sampling_params)
        return cast(list[RequestOutput], self._run(jobs, params, use_tqdm, on_error))

    def embed(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True,
        *,
        on_error: OnError = "raise",
    ) -> list[PoolingRequestOutput]:
        """Turn prompts into vectors; ``output.outputs.embedding`` is a list, ``.data`` a tensor.

        How hidden states are pooled is the family's default, or ``LLM(pooling_type=, normalize=)``.
        ``pooling_params`` are for all prompts, or one each; the other arguments are those of `generate`.
        """
        process = partial(self.engine.frontend.processor.process, min_new_tokens=0)
        jobs = [partial(process, prompt) for prompt in _listed(prompts)]
        params = _one_each(len(jobs), pooling_params or PoolingParams(), PoolingParams, "pooling_params")
        return cast(list[PoolingRequestOutput], self._run(jobs, params, use_tqdm, on_error))

    encode = embed
    """The older name."""

    def beam_search(
        self, prompts: PromptInput | Sequence[PromptInput], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The ``params.beam_width`` most probable continuations of each prompt, best first."""
        frontend = self.engine.frontend
        return beam_search(
            self.engine,
            [frontend.processor.process(prompt) for prompt in _listed(prompts)],
            params,
            tokenizer=frontend.tokenizer,
            eos_token_ids=frontend.eos_token_ids,
            max_len=self.engine.info.max_model_len,
        )

    # ---- streams ------------------------------------------------------------------------------

    def stream(
        self, prompt: PromptInput, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Answer one prompt, giving the output so far after every step."""
        return self._stream(self.engine.frontend.processor.process(prompt), sampling_params)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, **options: Any
    ) -> Iterator[RequestOutput]:
        """Answer one conversation, giving the output so far after every step.

        Args:
            messages: as in `chat`.
            sampling_params: as in `chat`.
            options: fields of `opsin.inputs.chat.ChatOptions`, which `chat` describes.

        Raises:
            ConfigError: there is no such option.
        """
        require_known("LLM.stream_chat", options, ChatOptions.__dataclass_fields__, ConfigError)
        return self._stream(self._process_chat(messages, ChatOptions(**options)), sampling_params)

    # ---- around -------------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.frontend.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The checkpoint's generation_config as sampling parameters."""
        return self.engine.info.default_params()

    def close(self) -> None:
        """Release the model."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- inside -------------------------------------------------------------------------------

    def _process_chat(self, messages: Sequence[Message], options: ChatOptions) -> ProcessedPrompt:
        frontend = self.engine.frontend
        return frontend.chat(frontend.conversation(messages), options)

    def _stream(self, prompt: ProcessedPrompt, params: SamplingParams | None) -> Iterator[RequestOutput]:
        request_id = f"stream-{next(self._ids)}"
        self.engine.add(request_id, prompt, params or self.engine.info.default_params())
        try:
            while self.engine.has_unfinished():
                for output in self.engine.step():
                    if isinstance(output, RequestOutput) and output.request_id == request_id:
                        if output.error is not None:
                            raise output.error
                        yield output
        finally:
            self.engine.abort(request_id)

    def _run(
        self,
        jobs: Sequence[Callable[[], ProcessedPrompt]],
        params: Sequence[SamplingParams] | Sequence[PoolingParams],
        use_tqdm: bool,
        on_error: OnError,
    ) -> list[Output]:
        batch = next(self._ids)
        ids = [f"{batch}-{index}" for index in range(len(jobs))]
        results: dict[str, Output | None] = dict.fromkeys(ids)
        config = self.engine.config
        feed = Feed(
            jobs,
            num_threads=config.preprocess_threads,
            ahead=2 * config.max_num_seqs,
            has_room=self.engine.frontend.processor.held_media.has_room,
        )
        try:
            with tqdm(total=len(jobs), desc="answers", unit="req", disable=not use_tqdm) as progress:
                num_tokens = 0
                while feed or self.engine.has_unfinished():
                    finished = self._add_ready(feed, ids, params)
                    finished += [output for output in self.engine.step() if output.finished]
                    for output in finished:
                        if output.request_id in results:
                            results[output.request_id] = output
                            num_tokens += _num_tokens(output)
                            progress.update()
                    elapsed = progress.format_dict["elapsed"] or 1e-9
                    progress.set_postfix_str(f"{num_tokens / elapsed:.1f} tok/s", refresh=False)
        finally:
            feed.close()
            for request_id in ids:
                self.engine.abort(request_id)  # without an interruption there is nothing left to abort
        outputs = [output for output in results.values() if output is not None]
        if on_error == "raise":
            _raise_failures(outputs)
        return outputs

    def _add_ready(
        self, feed: Feed, ids: Sequence[str], params: Sequence[SamplingParams] | Sequence[PoolingParams]
    ) -> list[Output]:
        """Add the prompts that are prepared, in order; returns outputs of those that cannot be used."""
        failed: list[Output] = []
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
            try:
                prompt = future.result()
                self.engine.add(ids[index], prompt, params[index])
                room -= len(prompt.token_ids)
            except RequestError as error:
                failed.append(_refused(ids[index], error))
        return failed

    def _params_for(
        self, count: int, given: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        return _one_each(count, given or self.engine.info.default_params(), SamplingParams, "sampling_params")


def _one_each(count: int, given: P | Sequence[P], kind: type[P], name: str) -> list[P]:
    if isinstance(given, kind):
        return [given] * count
    params = list(cast(Sequence[P], given))
    if len(params) != count:
        raise ConfigError(f"{len(params)} {name} for {count} prompts; pass one, or one for each")
    return params


def _num_tokens(output: Output) -> int:
    if isinstance(output, RequestOutput):
        return sum(len(sample.token_ids) for sample in output.outputs)
    return len(output.prompt_token_ids)


def _listed(prompts: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    """One prompt or several -> a list; a list of integers is one prompt of token ids."""
    if isinstance(prompts, (str, Mapping)) or (prompts and all(isinstance(item, int) for item in prompts)):
        return [cast(PromptInput, prompts)]
    return list(cast(Sequence[PromptInput], prompts))


def _refused(request_id: str, error: RequestError) -> RequestOutput:
    """The output of a prompt that never reached the engine."""
    return RequestOutput(
        request_id, None, [], None, [], finished=True, metrics=RequestMetrics(time.monotonic()), error=error
    )


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
