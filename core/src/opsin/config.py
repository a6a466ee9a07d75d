"""What a user may set: `EngineConfig` for a model, `SamplingParams` and its siblings for a request.

Unknown names and impossible values are errors at construction. Only `SamplingParams` may be assigned to, as
vLLM's scripts do; a request keeps the values that it came with. `LLM`, the command line, the environment and
the YAML file take the names, defaults and help of `EngineConfig`; the sections of its docstring are the
topics of ``opsin serve --help``.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from functools import cache
from numbers import Integral, Real
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from opsin.api import PoolingType
from opsin.errors import ConfigError, MediaError, require_known
from opsin.vllm_names import (
    BEAM_SEARCH,
    ENGINE,
    POOLING,
    SAMPLING,
    STRUCTURED,
    Renamed,
    takes_vllm_names,
    translated,
)

MAX_LOGPROBS = 20
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True, repr=False)
class Range:
    """Bounds of a finite number, both included: the metadata of an ``Annotated`` type."""

    least: float
    most: float = math.inf

    def __contains__(self, value: Any) -> bool:
        return bool(self.least <= value <= self.most and value != math.inf)

    def __repr__(self) -> str:
        return f"at least {self.least}" if self.most == math.inf else f"{self.least} to {self.most}"


Positive = Annotated[int, Range(1)]
NonNegative = Annotated[int, Range(0)]

_KINDS: Mapping[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: (str, "a string"),
    NoneType: (NoneType, "None"),
    Mapping: (Mapping, "a mapping"),
    Sequence: (Sequence, "a list"),
    Callable: (Callable, "a function"),
    Any: (object, "anything"),
}


@cache
def _hints(settings: type) -> dict[str, Any]:
    return get_type_hints(settings, include_extras=True)


def check_fields(settings: object) -> None:
    """Check that the fields of a dataclass have the values that their types describe.

    Numbers of numpy become Python's, and paths become strings.

    Raises:
        ConfigError: a value is not of its field's type.
    """
    kind: Any = type(settings)
    for name, hint in _hints(kind).items():
        value = getattr(settings, name)
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        expected = expectation(hint, value)
        if expected and isinstance(value, PurePath):
            value = str(value)
            expected = expectation(hint, value)
        if expected:
            raise ConfigError(f"{name}={value!r:.200}: expected {expected}")
        object.__setattr__(settings, name, value)


def expectation(hint: Any, value: Any) -> str | None:
    """What a type accepts, where the value is something else."""
    expected = []
    for member in _members(hint):
        wrong = _unlike(*member, value)
        if wrong is None:
            return None
        expected.append(wrong)
    return " or ".join(filter(None, expected))


@cache
def _members(hint: Any) -> list[tuple[Any, Any, tuple[Any, ...]]]:
    """The types of a union, or the one there is: each with its origin and arguments."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [(member, get_origin(member), get_args(member)) for member in members]


def _unlike(member: Any, origin: Any, arguments: tuple[Any, ...], value: Any) -> str | None:
    if origin is Literal:
        return None if value in arguments else ", ".join(map(repr, arguments))
    if origin is Annotated:
        fits = _unlike(arguments[0], None, (), value) is None and value in arguments[1]
        return None if fits else f"{_KINDS[arguments[0]][1]}, {arguments[1]}"
    kind, what = _KINDS.get(origin or member) or (member, f"a {member.__name__}")
    # To Python, True and False are integers, and a text is a sequence.
    odd = isinstance(value, bool) if kind in (Integral, Real) else isinstance(value, (str, bytes))
    if not isinstance(value, kind) or (odd and kind in (Integral, Real, Sequence)):
        return what
    inside: list[tuple[str, Any, Iterable[Any]]]
    if isinstance(value, Mapping) and arguments:
        inside = [("its keys", arguments[0], value), ("its values", arguments[1], value.values())]
    else:
        inside = [("each", arguments[0], value)] if kind is Sequence else []
    for which, hint, elements in inside:
        for element in elements:
            if wrong := expectation(hint, element):
                return f"{what}, {which} {wrong}"
    return None


def parameters_of(settings: type) -> list[inspect.Parameter]:
    """The fields of a dataclass as parameters of a function: named, or positional if there is no default."""
    hints = get_type_hints(settings, include_extras=True)
    parameters = []
    for f in sorted(
        fields(settings), key=lambda f: f.name not in settings.__annotations__
    ):  # a base's are last
        parameter = inspect.Parameter(
            f.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hints[f.name]
        )
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if default is not MISSING:
            parameter = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=default)
        parameters.append(parameter)
    return parameters


@takes_vllm_names(STRUCTURED)
@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """A constraint on the text of an answer. Exactly one field is set.

    Attributes:
        json: a JSON schema (a dict or its text).
        json_object: any JSON object.
        regex: a regular expression for the whole text.
        choice: one of these texts.
        grammar: a context-free grammar in Lark's notation, from ``start``.
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ConfigError(
                f"structured output has {given or 'nothing'} set: expected exactly one constraint"
            )
        if self.choice is not None and (not self.choice or not all(self.choice)):
            raise ConfigError("structured output: choice needs at least one text, and none may be empty")


StructuredOutputsParams = GuidedDecodingParams = StructuredOutput
"""vLLM's names."""


class RequestOutputKind(Enum):
    """What each output of a stream holds: all so far, what is new, or (only the last one) all."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


LogitsProcessor = Callable[..., Any]
"""``(output_ids, logits) -> logits``, or ``(prompt_ids, output_ids, logits) -> logits``.

Logits are float32 (V,), a row of the step's batch, which may be changed in place.
"""

_NumLogprobs = Annotated[int, Range(-1, MAX_LOGPROBS)]
_Penalty = Annotated[float, Range(-2, 2)]


@takes_vllm_names(SAMPLING)
@dataclass
class SamplingParams:
    """How tokens are chosen and when a request ends. Field names and meanings are vLLM's.

    Attributes:
        n: samples per prompt.
        temperature: 0 means greedy.
        top_p, top_k, min_p: nucleus, k-best (0: all) and relative-probability cuts.
        seed: makes this request's samples reproducible, whatever else runs alongside.
        stop: end when the text contains one of these; it is cut off unless ``include_stop_str_in_output``.
        stop_token_ids: end after one of these ids; its text is not part of the output.
        ignore_eos: go on after the model's end-of-sequence ids.
        max_tokens: None: up to the context's end.
        min_tokens: no end-of-sequence or stop token before this many.
        presence_penalty, frequency_penalty: subtracted per generated token present / per occurrence.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
        logit_bias: token id -> added to its logit.
        logprobs: return the log-probabilities of this many best tokens (-1: of all), and of the chosen one.
        prompt_logprobs: the same for every prompt token.
        structured: a constraint on the text. vLLM's names are ``structured_outputs``, ``guided_decoding``.
        skip_special_tokens: leave special tokens out of the text.
        priority: whose turn it is, where `EngineConfig.scheduling_policy` is ``"priority"``: smaller numbers
            first, equal ones in the order of arrival.
        bad_words: texts whose tokens are never generated one after the other.
        allowed_token_ids: generate no other tokens.
        logits_processors: functions that change the logits of each token, in order, after ``logit_bias``.
        truncate_prompt_tokens: keep this many of the prompt's last tokens; -1: as many as the context holds.
        detokenize: make text of the tokens.
        output_kind: what each output of a stream holds.
    """

    n: Positive = 1
    temperature: Annotated[float, Range(0)] = 1.0
    top_p: Annotated[float, Range(0, 1)] = 1.0
    top_k: Annotated[int, Range(-1)] = 0
    min_p: Annotated[float, Range(0, 1)] = 0.0
    seed: Annotated[int, Range(INT64_MIN, INT64_MAX)] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: Positive | None = 16
    min_tokens: NonNegative = 0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: Annotated[float, Range(0, 100)] = 1.0
    logit_bias: Mapping[int, Annotated[float, Range(-100, 100)]] | None = None
    logprobs: _NumLogprobs | None = None
    prompt_logprobs: _NumLogprobs | None = None
    structured: StructuredOutput | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    truncate_prompt_tokens: Annotated[int, Range(-1)] | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        values = vars(self)
        if isinstance(self.stop, str):
            values["stop"] = [self.stop]
        for name in ("stop", "stop_token_ids"):
            values[name] = () if values[name] is None else _as_tuple(values[name])
        for name in ("bad_words", "allowed_token_ids", "logits_processors"):
            given = _as_tuple(values[name])
            values[name] = None if given == () else given
        if self.logit_bias is None:
            values["logit_bias"] = {}
        elif isinstance(self.logit_bias, Mapping):  # JSON has texts for keys
            keys = (int(key) if str(key).isdecimal() else key for key in self.logit_bias)
            values["logit_bias"] = dict(zip(keys, self.logit_bias.values()))
        check_fields(self)
        values["top_k"] = max(0, self.top_k)  # -1 is vLLM's older spelling of "all"
        most = INT64_MAX if self.max_tokens is None else self.max_tokens
        for name, fine, expected in (
            ("top_p", self.top_p > 0, "a number greater than 0, at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "a number greater than 0, at most 100"),
            ("stop", all(self.stop_strings), "non-empty strings"),
            ("stop", self.detokenize or not self.stop, "none with detokenize=False: there is no text"),
            ("bad_words", all(map(str.strip, self.bad_words or ())), "non-empty strings"),
            ("min_tokens", self.min_tokens <= most, "between 0 and max_tokens"),
            ("truncate_prompt_tokens", self.truncate_prompt_tokens != 0, "at least 1, or -1"),
        ):
            if not fine:
                raise ConfigError(f"{name}={values[name]!r}: expected {expected}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a field; checked as at construction."""
        if len(vars(self)) == len(self.__dataclass_fields__):
            entry = SAMPLING.get(name)
            name = entry.to if isinstance(entry, Renamed) else name
            require_known("SamplingParams", [name], self.__dataclass_fields__, ConfigError)
            vars(self).update(vars(replace(self, **{name: value})))
        else:  # within the constructor
            vars(self)[name] = value

    def clone(self) -> SamplingParams:
        """A copy."""
        return copy.copy(self)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken (temperature 0, or only one candidate left)."""
        return self.temperature == 0 or self.top_k == 1

    @classmethod
    def from_generation_config(cls, defaults: Mapping[str, Any], **changes: Any) -> SamplingParams:
        """The checkpoint's generation_config.json as defaults, overridden by ``changes``.

        ``do_sample: false`` means greedy; a missing max_new_tokens leaves opsin's default.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        taken = {name: defaults[name] for name in names if defaults.get(name) is not None}
        if defaults.get("do_sample") is False:
            taken["temperature"] = 0.0
        if defaults.get("max_new_tokens") is not None:
            taken["max_tokens"] = defaults["max_new_tokens"]
        return cls(**{**taken, **changes})


@takes_vllm_names(BEAM_SEARCH)
@dataclass(frozen=True)
class BeamSearchParams:
    """Beam search: keep the ``beam_width`` most probable continuations at every step.

    Attributes:
        beam_width: beams kept, and sequences returned.
        max_tokens: longest continuation.
        ignore_eos: beams do not end at an end-of-sequence id.
        length_penalty: a finished beam's score is its log-probability / length ** length_penalty.
    """

    beam_width: Annotated[int, Range(1, MAX_LOGPROBS // 2)]
    max_tokens: Positive = 16
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)


@takes_vllm_names(POOLING)
@dataclass(frozen=True)
class PoolingParams:
    """Settings of an embedding request.

    Attributes:
        dimensions: keep this many leading dimensions, and normalise after that (models trained for it:
            Kusupati et al. 2022, Matryoshka representation learning).
        truncate_prompt_tokens: as in `SamplingParams`.
    """

    dimensions: Positive | None = None
    truncate_prompt_tokens: Annotated[int, Range(-1)] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.truncate_prompt_tokens == 0:
            raise ConfigError("truncate_prompt_tokens=0: expected at least 1, or -1")


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """How pictures and videos are read, and what one may cost before it is refused.

    Pictures and videos:
        image_background: colour that transparent pictures and videos are laid on, as a name or #rrggbb.
        max_media_bytes: most encoded bytes of one picture or video.
        max_image_pixels: most pixels (width x height) of a picture or of one frame.
        max_video_pixels: most pixels of a video (width x height x frames).
        max_video_frames: most frames of a video given as frames.
        sampled_video_frames: frames taken from a video file that has more, evenly spread.
    """

    image_background: str = "white"
    max_media_bytes: Positive = 64 * 2**20
    max_image_pixels: Positive = 64 * 2**20
    max_video_pixels: Positive = 256 * 2**20
    max_video_frames: Positive = 768
    sampled_video_frames: Positive = 32

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.background

    @property
    def background(self) -> tuple[int, int, int]:
        """``image_background`` as RGB.

        Raises:
            ConfigError: it is no opaque colour.
        """
        from PIL import ImageColor  # here, because importing opsin loads no PIL

        try:
            red, green, blue = tuple(ImageColor.getrgb(self.image_background))
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(
                f"image_background={self.image_background!r}: expected a colour such as white or #ffffff"
            ) from None
        return red, green, blue

    def check_size(self, width: int, height: int, frames: int = 1) -> None:
        """Refuse empty and oversized pictures and videos.

        Raises:
            MediaError: a side is 0, or a limit is exceeded.
        """
        if width < 1 or height < 1 or frames < 1:
            raise MediaError(f"got {frames} frame(s) of {width}x{height} pixels; expected at least one pixel")
        if width * height > self.max_image_pixels:
            raise MediaError(
                f"{width}x{height} pixels are too many; at most {self.max_image_pixels} are accepted"
            )
        if width * height * frames > self.max_video_pixels:
            raise MediaError(
                f"{frames} frames of {width}x{height} pixels are too many; "
                f"at most {self.max_video_pixels} pixels in all are accepted"
            )

    def check_num_frames(self, num_frames: int) -> None:
        """Refuse a video given as no frames, or as too many.

        Raises:
            MediaError: it is.
        """
        if not 1 <= num_frames <= self.max_video_frames:
            raise MediaError(f"got a video of {num_frames} frames; expected 1 to {self.max_video_frames}")


_TASKS = {"auto": None, "generate": "generate", "embed": "embed", "embedding": "embed"}
_RUNNERS = {"auto": None, "generate": "generate", "pooling": "embed"}
_DTYPES = {"float": "float32", "half": "float16"}


@dataclass(frozen=True, kw_only=True)
class EngineConfig(MediaLimits):
    """Settings of an engine, as requested.

    Model:
        model: a folder, the name of an installed checkpoint (``opsin plugins`` lists them), or a hub id.
        task: what the model is for: ``generate`` answers, ``embed`` or ``embedding`` turns prompts into
            vectors. ``auto`` is what ``runner`` says, otherwise ``generate``.
        runner: the task in vLLM's newer words: ``generate`` or ``pooling``.
        revision: revision on the hub.
        tokenizer: another folder or hub id for the tokenizer.
        device: where the model runs: ``auto``, NAME or NAME:INDEX. ``opsin doctor`` lists them.
        dtype: type to compute in. ``auto`` is what the device prefers for the checkpoint's type; ``float`` is
            float32, ``half`` is float16.
        max_model_len: most tokens of prompt and answer together. Default: what the model allows and memory
            holds.
        load_format: accepted for compatibility. Only safetensors are ever read.
        trust_remote_code: accepted for compatibility. Code from a model repository is never run.
        seed: seed of requests that bring none. Default: none, so that their answers vary.
        prefer: which plugin wins a conflict over a key: KIND:KEY=PLUGIN.

    Chat and embeddings:
        chat_template: file or Jinja text. Default: the checkpoint's own, otherwise the model family's.
        chat_template_content_format: content that the template expects: ``string`` (text with placeholders)
            or ``openai`` (a list of parts); ``auto`` finds out from the template.
        tool_call_parser: form of tool calls. Default: that of the model's family.
        pooling_type: how embeddings are made. Default: as the model was trained.
        normalize: whether embeddings have L2 norm 1. Default: as the model was trained.

    Pictures and videos:
        limit_mm_per_prompt: most items of each modality in one prompt, such as image=2,video=1. Default: the
            model family's.
        mm_processor_kwargs: options of the model family's media processing, such as max_pixels=50176.

    Engine:
        max_num_seqs: most sequences computed in one step.
        max_num_batched_tokens: most tokens computed in one step. Longer prompts are computed in chunks.
        max_encoder_tokens: most media embeddings computed in one step. A single larger item still runs,
            alone.
        enable_prefix_caching: whether equal beginnings of prompts are computed once.
        scheduling_policy: whose turn it is: ``fcfs``, first come, first served; or ``priority``, by the
            priority of requests, with which clients can push each other back.
        kv_cache_memory: bytes of the KV cache. Default: a share of the device's free memory.
        encoder_cache_memory: bytes of encoded media kept for reuse.
        media_cache_memory: bytes of preprocessed media kept for reuse, in host memory.
        pending_media_memory: bytes of preprocessed media that prompts hold until they are answered, in host
            memory. Further prompts with media are prepared when there is room.
        preprocess_threads: threads that decode, preprocess and hash media.

    Attributes:
        local_media: whether chat messages may name files of this machine. `LLM` allows it, since its caller
            is this machine's user; a server does not, and has no flag for it.
    """

    model: str
    task: Literal["auto", "generate", "embed", "embedding"] = "auto"
    runner: Literal["auto", "generate", "pooling"] = "auto"
    revision: str | None = None
    tokenizer: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float", "half"] = "auto"
    max_model_len: Positive | None = None
    load_format: Literal["auto", "safetensors"] = "auto"
    trust_remote_code: bool = False
    seed: int | None = None
    prefer: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    tool_call_parser: Literal["auto", "hermes"] = "auto"
    pooling_type: PoolingType | None = None
    normalize: bool | None = None
    limit_mm_per_prompt: Mapping[str, int] | None = None
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_num_seqs: Positive = 64
    max_num_batched_tokens: Positive = 2048
    max_encoder_tokens: Positive = 8192
    enable_prefix_caching: bool = True
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    kv_cache_memory: Positive | None = None
    encoder_cache_memory: NonNegative = 512 * 2**20
    media_cache_memory: NonNegative = 512 * 2**20
    pending_media_memory: Positive = 2**30
    preprocess_threads: Positive = 2
    local_media: bool = False

    def __post_init__(self) -> None:
        dtype = str(self.dtype).removeprefix("torch.")
        self._put("dtype", _DTYPES.get(dtype, dtype))
        self._put("mm_processor_kwargs", self.mm_processor_kwargs or {})
        if isinstance(self.limit_mm_per_prompt, Mapping):
            limits = {modality: _count(limit) for modality, limit in self.limit_mm_per_prompt.items()}
            self._put("limit_mm_per_prompt", limits)
            for modality, limit in limits.items():
                if wrong := expectation(NonNegative, limit):
                    raise ConfigError(f"limit_mm_per_prompt[{modality!r}]={limit!r}: expected {wrong}")
        super().__post_init__()
        task, by_runner = _TASKS[self.task], _RUNNERS[self.runner]
        if task and by_runner and task != by_runner:
            raise ConfigError(f"task={self.task!r} and runner={self.runner!r} contradict each other; set one")
        self._put("task", task or by_runner or "generate")
        self._put("mm_processor_kwargs", dict(self.mm_processor_kwargs))

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class EngineArgs(EngineConfig):
    """`EngineConfig` that takes the arguments of vLLM's class: ``LLM(**asdict(EngineArgs(...)))``.

    Its ``local_media`` is on, as in `LLM`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"local_media": True, **engine_settings("EngineArgs", settings)})


def engine_settings(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for an engine, vLLM's included, as fields of `EngineConfig`; None asks for nothing.

    A field with its default gives way to vLLM's name for it: `dataclasses.asdict` lists all fields.

    Raises:
        ConfigError: an argument is unknown, or asks for what opsin has not.
    """
    fields = EngineConfig.__dataclass_fields__
    entries = [ENGINE.get(name) for name, value in given.items() if value is not None]
    meant = {entry.to for entry in entries if isinstance(entry, Renamed)}
    asked = {
        name: value
        for name, value in given.items()
        if value is not None and not (name in meant and value == fields[name].default)
    }
    return translated(where, asked, ENGINE, fields)


def _as_tuple(values: Any) -> Any:
    """A list, tuple, set or array -> a tuple; anything else is left for the check to name."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return tuple(values) if isinstance(values, (list, tuple, set, frozenset)) else values


def _count(limit: Any) -> Any:
    """The limit in vLLM's newer form, ``{"count": 2, ...}``, whose sizes are for its memory profiling."""
    return limit.get("count") if isinstance(limit, Mapping) else limit
