"""What a user may set: `SamplingParams`, `PoolingParams`, `EngineConfig`; and `resolve`, a pure function.

All three are frozen; unknown names and impossible values are errors when they are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opsin.api import PoolingType
from opsin.errors import ConfigError, MediaError

MAX_LOGPROBS = 20
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


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


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a request ends. Field names and meanings are vLLM's.

    Attributes:
        n: samples per prompt.
        temperature: 0 means greedy.
        top_p, top_k, min_p: nucleus, k-best (0: all) and relative-probability cuts.
        seed: makes this request's samples reproducible, whatever else runs beside it.
        stop: end when the text contains one of these; it is cut off unless ``include_stop_str_in_output``.
        stop_token_ids: end after one of these ids; its text is not part of the output.
        ignore_eos: go on after the model's end-of-sequence ids.
        max_tokens: None: up to the context's end.
        min_tokens: no end-of-sequence or stop token before this many.
        presence_penalty, frequency_penalty: subtracted per generated token present / per occurrence.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
        logit_bias: token id -> added to its logit.
        logprobs: return the log-probabilities of this many best tokens, and of the chosen one.
        prompt_logprobs: the same for every prompt token.
        structured: a constraint on the text.
        skip_special_tokens: leave special tokens out of the text.
        priority: whose turn it is, where `EngineConfig.scheduling_policy` is ``"priority"``: smaller numbers
            first, equal ones in the order of arrival.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: StructuredOutput | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    priority: int = 0

    def __post_init__(self) -> None:
        stop = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.top_k == -1:  # vLLM's older spelling of "all"
            object.__setattr__(self, "top_k", 0)
        bias = {int(token): float(value) for token, value in (self.logit_bias or {}).items()}
        object.__setattr__(self, "logit_bias", bias)
        checks = {
            "n": (self.n >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "a finite number, 0 or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "seed": (self.seed is None or INT64_MIN <= self.seed <= INT64_MAX, "a 64-bit integer"),
            "stop": (all(self.stop_strings), "non-empty strings"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            "min_tokens": (
                0 <= self.min_tokens <= (INT64_MAX if self.max_tokens is None else self.max_tokens),
                "between 0 and max_tokens",
            ),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "in (0, 100]"),
            "logit_bias": (all(-100 <= b <= 100 for b in bias.values()), "values in [-100, 100]"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
            "prompt_logprobs": (
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
                f"0 to {MAX_LOGPROBS}",
            ),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected {expected}")

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


@dataclass(frozen=True)
class BeamSearchParams:
    """Beam search: keep the ``beam_width`` most probable continuations at every step.

    Attributes:
        beam_width: beams kept, and sequences returned.
        max_tokens: longest continuation.
        ignore_eos: beams do not end at an end-of-sequence id.
        length_penalty: a finished beam's score is its log-probability / length ** length_penalty.
    """

    beam_width: int
    max_tokens: int = 16
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= MAX_LOGPROBS // 2:
            raise ConfigError(f"beam_width={self.beam_width}: expected 1 to {MAX_LOGPROBS // 2}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens}: expected at least 1")


@dataclass(frozen=True)
class PoolingParams:
    """Settings of an embedding request.

    Attributes:
        dimensions: keep this many leading dimensions, and normalise after that (models trained for it:
            Kusupati et al. 2022, Matryoshka representation learning).
    """

    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.dimensions is not None and self.dimensions < 1:
            raise ConfigError(f"dimensions={self.dimensions}: expected at least 1, or None for all")


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What one media item may cost before it is refused.

    Attributes:
        max_bytes: encoded size.
        max_pixels: width x height of a picture or of one frame.
        max_frames: frames of a video given as frames.
        max_video_pixels: width x height x frames of a video.
        sampled_frames: a video *file* with more frames is sampled down to this many, evenly spread.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64 * 2**20
    max_frames: int = 768
    max_video_pixels: int = 256 * 2**20
    sampled_frames: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1")

    def check_size(self, width: int, height: int, frames: int = 1) -> None:
        """Refuse empty and oversized pictures and videos.

        Raises:
            MediaError: a side is 0, or a limit is exceeded.
        """
        if width < 1 or height < 1 or frames < 1:
            raise MediaError(f"got {frames} frame(s) of {width}x{height} pixels; expected at least one pixel")
        if width * height > self.max_pixels:
            raise MediaError(f"{width}x{height} pixels are too many; at most {self.max_pixels} are accepted")
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
        if not 1 <= num_frames <= self.max_frames:
            raise MediaError(f"got a video of {num_frames} frames; expected 1 to {self.max_frames}")


DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine, as asked for.

    Attributes:
        model: folder, installed checkpoint name, or hub id.
        tokenizer: another folder or id for the tokenizer.
        revision: hub revision.
        task: ``"generate"``, or ``"embed"`` to turn prompts into vectors.
        pooling_type, normalize: how embeddings are made; None: as the family's models were trained.
        device: ``"auto"``, a device name, or ``"name:index"``.
        dtype: ``"auto"`` runs in what the device prefers for the checkpoint's dtype.
        max_model_len: longest prompt plus output, in tokens; None: what the model allows.
        max_num_seqs: most sequences computed in one step.
        max_num_batched_tokens: most tokens computed in one step (longer prompts are chunked).
        max_encoder_tokens: most media embeddings computed in one step (one larger item still runs alone).
        enable_prefix_caching: reuse the KV blocks of equal prefixes.
        scheduling_policy: ``"fcfs"``, first come, first served; or ``"priority"``, see `SamplingParams`.
        kv_cache_memory: bytes; None: a share of the device's free memory.
        encoder_cache_memory: bytes for encoder outputs kept by digest.
        media_cache_memory: host bytes for mapped media kept by digest.
        chat_template: file or Jinja text used instead of the checkpoint's own.
        chat_template_content_format: what the template wants as content: ``"string"`` (text with
            placeholders) or ``"openai"`` (a list of parts); ``"auto"`` finds out from the template.
        local_media: whether chat messages may name files of this machine.
        limit_mm_per_prompt: modality -> most items in one prompt; None: the family's defaults.
        mm_processor_kwargs: options of the family's input mapper, for every request.
        max_media_bytes: most encoded bytes of one picture or video.
        max_image_pixels: most pixels of one picture or frame.
        max_video_frames: most frames of a video given as frames.
        max_video_pixels: most pixels of all frames of a video.
        sampled_video_frames: a video file with more frames is sampled down to this many.
        seed: of requests that bring none; None: not reproducible.
        trust_remote_code: accepted for compatibility. Code from a model repository is never run.
        preprocess_threads: threads that decode, map and hash media.
        prefer: plugin-conflict key -> plugin name that wins it.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    task: Literal["generate", "embed"] = "generate"
    pooling_type: PoolingType | None = None
    normalize: bool | None = None
    device: str = "auto"
    dtype: DType = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_encoder_tokens: int = 8192
    enable_prefix_caching: bool = True
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    kv_cache_memory: int | None = None
    encoder_cache_memory: int = 512 * 2**20
    media_cache_memory: int = 512 * 2**20
    chat_template: str | None = None
    chat_template_content_format: Literal["auto", "openai", "string"] = "auto"
    local_media: bool = False
    limit_mm_per_prompt: Mapping[str, int] | None = None
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_media_bytes: int = 64 * 2**20
    max_image_pixels: int = 64 * 2**20
    max_video_frames: int = 768
    max_video_pixels: int = 256 * 2**20
    sampled_video_frames: int = 32
    seed: int | None = None
    trust_remote_code: bool = False
    preprocess_threads: int = 2
    prefer: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_encoder_tokens", "preprocess_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("max_model_len", "kv_cache_memory"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1, or None")
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise ConfigError(f"scheduling_policy={self.scheduling_policy!r}: expected 'fcfs' or 'priority'")
        for modality, limit in (self.limit_mm_per_prompt or {}).items():
            if not isinstance(limit, int) or limit < 0:
                raise ConfigError(f"limit_mm_per_prompt[{modality!r}]={limit!r}: expected 0 or more")
        object.__setattr__(self, "mm_processor_kwargs", dict(self.mm_processor_kwargs or {}))
