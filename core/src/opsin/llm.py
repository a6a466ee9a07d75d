"""`LLM`: the offline door. Batches of prompts or conversations in, finished outputs back in order."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, replace
from numbers import Integral
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from torch.nn.functional import cosine_similarity

from opsin.api import Tokenizer
from opsin.batches import Batches, OnError, Progress
from opsin.config import EngineConfig, engine_settings
from opsin.engine.beam import beam_search
from opsin.engine.engine import Engine
from opsin.errors import (
    ConfigError,
    require_known,
)
from opsin.fetch.library import default_settings
from opsin.fetch.settings import FetchSettings
from opsin.fields import parameters_of
from opsin.inputs.chat import ChatOptions, Tool
from opsin.inputs.prompt import PromptInput
from opsin.params import BeamSearchParams, PoolingParams, SamplingParams
from opsin.plugins import Plugins
from opsin.results import (
    BeamSearchOutput,
    Metric,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    Vector,
)
from opsin.vllm_names import CALL, METHODS, translated

Message = Mapping[str, Any]
T = TypeVar("T")


def _signature() -> inspect.Signature:
    """`LLM`'s: `model`, ``plugins``, ``fetch_urls``, and the other fields of `EngineConfig`."""
    only = inspect.Parameter.KEYWORD_ONLY
    own = [
        inspect.Parameter("plugins", only, default=None, annotation=Plugins | None),
        inspect.Parameter("fetch_urls", only, default=True, annotation=bool | FetchSettings),
    ]
    model, *settings = parameters_of(EngineConfig)
    local = [p.replace(default=True) if p.name == "local_media" else p for p in settings]
    return inspect.Signature([model, *own, *local])


class LLM:
    """A vision-language model, ready to answer.

    Examples:
        >>> llm = LLM("path/to/checkpoint")
        >>> question = {"type": "text", "text": "What colour is the circle?"}
        >>> picture = {"type": "image_pil", "image_pil": PIL.Image.open("circle.png")}
        >>> llm.chat([{"role": "user", "content": [picture, question]}])[0].outputs[0].text
        'The circle is red.'

    vLLM's names are accepted: docs/vllm.md says which have an effect.
    """

    __signature__ = _signature()

    def __init__(
        self,
        model: str,
        *,
        plugins: Plugins | None = None,
        fetch_urls: bool | FetchSettings = True,
        **settings: Any,
    ) -> None:
        """Load a model.

        Args:
            model: a folder, the name of an installed checkpoint (``opsin plugins`` lists them) or a hub id.
            plugins: already loaded plugins. Default: those installed.
            fetch_urls: whether `chat` fetches the http(s) URLs of pictures and videos, by the rules of
                `opsin serve`: public addresses only, within limits of time and size; or those rules, changed
                (`opsin.fetch.settings.FetchSettings`). Needs ``opsin[serve]``. With vLLM's
                ``allowed_media_domains=[...]`` it fetches from those hosts only.
            settings: fields of `EngineConfig`; `help(EngineConfig)` describes them.

        Raises:
            ConfigError: a setting is unknown or impossible.
            MissingPluginError: no plugin provides the model's architecture or the device.
            CheckpointError: the checkpoint cannot be found or is not complete.
        """
        domains = settings.pop("allowed_media_domains", None)
        # The caller is this machine's user, who may read its files anyway.
        given = {"local_media": True, **engine_settings("LLM", settings)}
        self.engine = Engine(EngineConfig(model=model, **given), plugins)
        if fetch_urls is True:
            fetch_urls = default_settings(self.engine.config.max_media_bytes)
        if domains is not None and fetch_urls:
            fetch_urls = replace(fetch_urls, allowed_media_domains=domains)
        self._batches = Batches(self.engine, fetch_urls or None)

    def __getattr__(self, name: str) -> Any:
        if name in METHODS:
            raise AttributeError(f"LLM.{name} is not in opsin: {METHODS[name]}")
        raise AttributeError(f"'LLM' object has no attribute {name!r}")

    # ---- batches ------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptInput | Iterable[PromptInput],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: Progress = True,
        *,
        on_error: OnError = "raise",
        priority: int | Iterable[int] | None = None,
        **other: Any,
    ) -> list[RequestOutput]:
        """Answer prompts as one batch.

        Args:
            prompts: one, a list, an array of token ids, or an iterator, which is read while others are
                answered; see `opsin.inputs.prompt.PromptInput`.
            sampling_params: for all, or one each; None: the checkpoint's generation_config.
            use_tqdm: show progress; or what to show it with.
            on_error: ``"raise"``: if requests failed, raise `RequestsFailed` once all others are done
                (a single prompt raises its own error). ``"return"``: return their outputs with ``error`` set.
            priority: as in `SamplingParams`, for all, or one each.
            other: vLLM's arguments that ask for nothing; all others are errors.

        Returns:
            Outputs in the order of the prompts.

        Raises:
            BatchInterrupted: Ctrl-C; ``.outputs`` has what is finished.
        """
        self._check_call("generate", other)
        prompts = _listed(prompts)
        params = self._sampling(prompts, sampling_params, priority)
        found = self._batches.run(prompts, params, progress=use_tqdm, on_error=on_error)
        return cast(list[RequestOutput], found)

    def generate_iter(
        self,
        prompts: PromptInput | Iterable[PromptInput],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        priority: int | Iterable[int] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Answer prompts as `generate` does; yields ``(index, output)`` as soon as one is finished.

        A failed request's output has ``error`` set. Leaving the iteration ends what is not finished.
        """
        self._check_call("generate_iter", {})
        prompts = _listed(prompts)
        params = self._sampling(prompts, sampling_params, priority)
        found = self._batches.iterate(prompts, params)
        return cast(Iterator[tuple[int, RequestOutput]], found)

    def chat(
        self,
        messages: Iterable[Message] | Iterable[Sequence[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: Progress = True,
        *,
        on_error: OnError = "raise",
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Tool] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
        allow_special_tokens: bool = False,
        priority: int | Iterable[int] | None = None,
        **misspelt: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, a list of them or an iterator over them as one batch.

        Args:
            messages: OpenAI-style messages; content parts as in `opsin.inputs.conversation`: ``text``,
                ``image_url`` (``data:``, ``file:`` and http(s) URLs), ``image_pil``, ``video`` and more.
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
            allow_special_tokens: take special tokens and placeholders in the messages as such, not as text.
                Only for messages that no one else has written.
            priority: as in `generate`.
            misspelt: names that are no parameters; each is an error, but for vLLM's that ask for nothing.

        Raises:
            ConfigError: there is no such parameter.
            BatchInterrupted: as in `generate`.
        """
        self._check_call("chat", misspelt)
        options = ChatOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
            cache_salt=cache_salt,
            allow_special_tokens=allow_special_tokens,
        )
        conversations = _conversations(messages)
        params = self._sampling(conversations, sampling_params, priority)
        found = self._batches.run(conversations, params, options, progress=use_tqdm, on_error=on_error)
        return cast(list[RequestOutput], found)

    def chat_iter(
        self,
        messages: Iterable[Message] | Iterable[Sequence[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Answer conversations as `chat` does, and yield as `generate_iter` does.

        Args:
            messages: as in `chat`.
            sampling_params: as in `chat`.
            options: fields of `opsin.inputs.chat.ChatOptions`, which `chat` describes.

        Raises:
            ConfigError: there is no such option.
        """
        chat_options = self._chat_options("chat_iter", options)
        conversations = _conversations(messages)
        params = self._sampling(conversations, sampling_params)
        found = self._batches.iterate(conversations, params, chat_options)
        return cast(Iterator[tuple[int, RequestOutput]], found)

    def embed(
        self,
        prompts: PromptInput | Iterable[PromptInput],
        pooling_params: PoolingParams | Iterable[PoolingParams] | None = None,
        use_tqdm: Progress = True,
        *,
        on_error: OnError = "raise",
        truncate_prompt_tokens: int | None = None,
        **other: Any,
    ) -> list[PoolingRequestOutput]:
        """Turn prompts into vectors; ``output.outputs.embedding`` is a list, ``.data`` a tensor.

        How hidden states are pooled is the family's default, or ``LLM(pooling_type=, normalize=)``.
        ``pooling_params`` are for all prompts, or one each; ``truncate_prompt_tokens`` is set in all of them.
        The other arguments are those of `generate`.
        """
        self._check_call("embed", other)
        prompts = _listed(prompts)
        params = self._pooling(prompts, pooling_params, truncate_prompt_tokens)
        found = self._batches.run(prompts, params, progress=use_tqdm, on_error=on_error)
        return cast(list[PoolingRequestOutput], found)

    encode = embed
    """The older name."""

    def embed_iter(
        self,
        prompts: PromptInput | Iterable[PromptInput],
        pooling_params: PoolingParams | Iterable[PoolingParams] | None = None,
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> Iterator[tuple[int, PoolingRequestOutput]]:
        """Turn prompts into vectors as `embed` does, and yield as `generate_iter` does."""
        prompts = _listed(prompts)
        params = self._pooling(prompts, pooling_params, truncate_prompt_tokens)
        found = self._batches.iterate(prompts, params)
        return cast(Iterator[tuple[int, PoolingRequestOutput]], found)

    def score(
        self,
        data_1: PromptInput | Iterable[PromptInput],
        data_2: PromptInput | Iterable[PromptInput],
        use_tqdm: Progress = True,
        *,
        truncate_prompt_tokens: int | None = None,
        **other: Any,
    ) -> list[ScoringRequestOutput]:
        """How similar prompts are: the cosine of their embeddings.

        Args:
            data_1: one prompt, compared with each of ``data_2``; or as many.
            data_2: one or several prompts.
            use_tqdm: as in `embed`.
            truncate_prompt_tokens: as in `embed`.
            other: as in `generate`.
        """
        self._check_call("score", other)
        first, second = list(_listed(data_1)), list(_listed(data_2))
        if len(first) not in (1, len(second)):
            raise ConfigError(f"score: {len(first)} and {len(second)} prompts; expected 1, or as many")
        found = self.embed(
            [*first, *second], use_tqdm=use_tqdm, truncate_prompt_tokens=truncate_prompt_tokens
        )
        ones = found[: len(first)] * (len(second) // len(first))
        return [_score(one, two) for one, two in zip(ones, found[len(first) :])]

    def beam_search(
        self, prompts: PromptInput | Iterable[PromptInput], params: BeamSearchParams, **other: Any
    ) -> list[BeamSearchOutput]:
        """The ``params.beam_width`` most probable continuations of each prompt, best first."""
        self._check_call("beam_search", other)
        frontend = self.engine.frontend
        return beam_search(
            SimpleNamespace(add=self.engine.add, step=self._batches.step, abort=self.engine.abort),
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
        """Answer one prompt, giving after every step what `SamplingParams.output_kind` says."""
        self._check_call("stream", {})
        params = sampling_params or self.get_default_sampling_params()
        return self._batches.stream(prompt, params)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, **options: Any
    ) -> Iterator[RequestOutput]:
        """Answer one conversation as `stream` does.

        Args:
            messages: as in `chat`.
            sampling_params: as in `chat`.
            options: fields of `opsin.inputs.chat.ChatOptions`, which `chat` describes.

        Raises:
            ConfigError: there is no such option.
        """
        chat_options = self._chat_options("stream_chat", options)
        params = sampling_params or self.get_default_sampling_params()
        return self._batches.stream(messages, params, chat_options)

    # ---- around -------------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.frontend.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The checkpoint's generation_config as sampling parameters."""
        return self.engine.info.default_params()

    def get_metrics(self) -> list[Metric]:
        """The engine's counters and gauges at this moment; see `opsin.results.EngineStats`.

        With ``speculative_config`` one of them is a `opsin.results.Vector`.
        """
        stats = asdict(self.engine.stats())
        forms = stats.pop("weight_forms")
        return [
            *(
                Vector(f"opsin:{name}", value) if isinstance(value, tuple) else Metric(f"opsin:{name}", value)
                for name, value in stats.items()
                if value != ()
            ),
            *(Metric(f'opsin:weight_forms{{form="{form}"}}', count) for form, count in forms.items()),
        ]

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. False, and nothing is forgotten, while requests are in progress."""
        return self.engine.reset_prefix_cache()

    def close(self) -> None:
        """Release the model."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- inside -------------------------------------------------------------------------------

    def _check_call(self, method: str, other: Mapping[str, Any]) -> None:
        """Refuse a wrong task, and what is no argument: Python's TypeError does not say what was meant."""
        if other:
            parameters = inspect.signature(getattr(self, method)).parameters.values()
            known = [
                parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD
            ]
            translated(f"LLM.{method}", other, CALL, known)
        if self.engine.config.task != "generate" and method not in ("embed", "score"):
            raise ConfigError(
                f'LLM.{method}: this model was loaded for embeddings; load it with task="generate" for '
                "answers, or use LLM.embed"
            )

    def _chat_options(self, method: str, options: Mapping[str, Any]) -> ChatOptions:
        self._check_call(method, {})
        require_known(f"LLM.{method}", options, ChatOptions.__dataclass_fields__, ConfigError)
        return ChatOptions(**options)

    def _sampling(
        self,
        prompts: Iterable[object],
        given: SamplingParams | Iterable[SamplingParams] | None,
        priority: int | Iterable[int] | None = None,
    ) -> Iterable[SamplingParams]:
        default = given or self.get_default_sampling_params()
        params = _one_each(prompts, default, SamplingParams, "sampling_params")
        if priority is None:
            return params
        return (
            replace(own, priority=value)
            for own, value in zip(params, _one_each(prompts, priority, int, "priority"))
        )

    def _pooling(
        self,
        prompts: Iterable[object],
        given: PoolingParams | Iterable[PoolingParams] | None,
        truncate: int | None,
    ) -> Iterable[PoolingParams]:
        params = _one_each(prompts, given or PoolingParams(), PoolingParams, "pooling_params")
        return params if truncate is None else (replace(p, truncate_prompt_tokens=truncate) for p in params)


def _one_each(prompts: Iterable[object], given: T | Iterable[T], kind: type[T], name: str) -> Iterable[T]:
    if isinstance(given, kind):
        return itertools.repeat(given)
    if not isinstance(given, Iterable):
        raise ConfigError(
            f"{name} is a {type(given).__name__}; expected {kind.__name__}, or one for each prompt"
        )
    both: list[object] = [given, prompts]
    sizes = [len(values) for values in both if isinstance(values, Sized)]
    if len(set(sizes)) == 2:
        raise ConfigError(f"{sizes[0]} {name} for {sizes[1]} prompts; pass one, or one for each")
    return given


def _listed(prompts: PromptInput | Iterable[PromptInput]) -> Iterable[PromptInput]:
    """One prompt or several -> several; integers are one prompt of token ids."""
    given: Any = prompts
    if hasattr(given, "tolist"):  # an array or a tensor: (T,), or (B, T)
        given = given.tolist()
    are_ids = isinstance(given, Sequence) and given and all(isinstance(item, Integral) for item in given)
    one = are_ids or isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable)
    return [given] if one else given


def _conversations(messages: Iterable[Message] | Iterable[Sequence[Message]]) -> Iterable[Sequence[Message]]:
    """One conversation or several -> several."""
    rest: Iterator[Any] = iter(messages)
    first = next(rest, None)
    if isinstance(first, Mapping):
        return [[first, *rest]]
    if isinstance(messages, Sequence):
        return cast(Sequence[Sequence[Message]], messages)
    return [] if first is None else itertools.chain([first], rest)


def _score(one: PoolingRequestOutput, two: PoolingRequestOutput) -> ScoringRequestOutput:
    assert one.outputs is not None
    assert two.outputs is not None
    similarity = float(cosine_similarity(one.outputs.data, two.outputs.data, dim=0))
    ids = [*one.prompt_token_ids, *two.prompt_token_ids]
    return ScoringRequestOutput(two.request_id, ScoringOutput(similarity), ids, True)
