"""What a user may set for a model: `EngineConfig`.

Unknown names and impossible values are errors at construction. `LLM`, the command line, the environment and
the YAML file take its names, defaults and help; the sections of its docstring are the topics of
``opsin serve --help``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opsin.api import PoolingType
from opsin.errors import ConfigError, MediaError, did_you_mean
from opsin.fields import NonNegative, Positive, check_fields, expectation
from opsin.vllm_names import ENGINE, SPECULATIVE, Renamed, translated


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


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How answers are guessed ahead: the value of `EngineConfig.speculative_config`, with vLLM's names.

    Attributes:
        num_speculative_tokens: most tokens guessed at once for one sequence.
        method: ``ngram`` takes what followed the same tokens earlier in the prompt or the answer.
        prompt_lookup_max: most tokens that are compared. Default: 4, or ``prompt_lookup_min`` if greater.
        prompt_lookup_min: tokens that must be the same. Default: 2, or ``prompt_lookup_max`` if less.
    """

    num_speculative_tokens: Positive
    method: Literal["ngram"] = "ngram"
    prompt_lookup_max: Positive | None = None
    prompt_lookup_min: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.shortest_match > self.longest_match:
            raise ConfigError(
                f"speculative_config: prompt_lookup_min={self.prompt_lookup_min} is greater than "
                f"prompt_lookup_max={self.prompt_lookup_max}"
            )

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> SpeculativeConfig:
        """The settings in a dict, which may have those of vLLM's names that change nothing.

        Raises:
            ConfigError: a name is unknown, or a value cannot be.
        """
        where = "speculative_config"
        settings = translated(where, given, SPECULATIVE, cls.__dataclass_fields__)
        settings = {name: value for name, value in settings.items() if value is not None}
        if "method" not in settings and given.get("model") is None:
            raise ConfigError(f'{where}: method is missing; expected "ngram"')
        if "num_speculative_tokens" not in settings:
            raise ConfigError(f"{where}: num_speculative_tokens is missing; expected a number, such as 8")
        try:
            return cls(**settings)
        except ConfigError as error:
            raise ConfigError(f"{where}: {str(error).removeprefix(where + ': ')}") from None

    @property
    def longest_match(self) -> int:
        """Tokens compared at most."""
        return self.prompt_lookup_max or max(4, self.prompt_lookup_min or 0)

    @property
    def shortest_match(self) -> int:
        """Tokens compared at least."""
        return self.prompt_lookup_min or min(2, self.longest_match)


_TASKS = {"auto": None, "generate": "generate", "embed": "embed", "embedding": "embed"}
_RUNNERS = {"auto": None, "generate": "generate", "pooling": "embed"}
_DTYPES = {"float": "float32", "half": "float16"}

QUANTIZATIONS = (
    *("auto", "int8", "int4", "none"),
    *("awq", "gptq", "auto-round", "compressed-tensors", "bitsandbytes", "fp8"),
)
"""What ``quantization`` may be. After the first four come methods of checkpoints, in vLLM's spelling."""

_QUANTIZATIONS = {None: "auto", "awq_marlin": "awq", "gptq_marlin": "gptq"}
"""vLLM's other names: of kernels, which are the device's matter here."""


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
        tensor_parallel_size: devices that compute each step together: INDEX of ``device`` and those after it;
            of ``cpu``, processes that divide the cores. Heads of the model must divide among them.
        tensor_parallel_timeout: seconds after which a rank that does not come to a step counts as lost.
        dtype: type to compute in. ``auto`` is what the device prefers for the checkpoint's type; ``float`` is
            float32, ``half`` is float16.
        quantization: bits of weights. ``auto`` takes them as they are stored. ``int8`` and ``int4`` round
            floats while they are loaded (``int4``: the decoder; all else to 8 bits) and let activations be
            rounded to 8 bits. ``none`` computes with floats even where integers are stored. The name of a
            method (``awq``, ``gptq``, ``auto-round``, ``compressed-tensors``, ``bitsandbytes``, ``fp8``) is
            ``auto`` for a checkpoint that must be stored so.
        quantization_group_size: inputs that share a scale where the decoder is rounded. Default: 32 for
            ``int4``, all of a row for ``int8``.
        lora: LoRA adapters (folders or hub ids) that are merged into the weights while these are loaded, one
            after the other.
        lora_scale: factor on what the adapters add: one for all of them, or one for each. Default: 1.
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
        generation_config: where sampling has its defaults: ``auto``, the checkpoint's generation_config.json;
            ``vllm``, nowhere (temperature 1, all tokens); or a folder that has such a file.
        override_generation_config: defaults of sampling that replace those, such as temperature=0.2,top_k=50.
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
        speculative_config: how answers are guessed ahead, such as method=ngram,num_speculative_tokens=8. It
            changes no answer. ``prompt_lookup_max`` and ``prompt_lookup_min`` say how many tokens must have
            stood together before. Default: not at all.
        kv_cache_memory: bytes of the KV cache, on each rank. Default: a share of the device's free memory.
        encoder_cache_memory: bytes of encoded media kept for reuse.
        media_cache_memory: bytes of preprocessed media kept for reuse, in host memory.
        pending_media_memory: bytes of preprocessed media that prompts hold until they are answered, in host
            memory. Further prompts with media are prepared when there is room.
        preprocess_threads: threads that decode, preprocess and hash media.

    Attributes:
        host_shares: engines that share this machine's memory.
        local_media: whether chat messages may name files of this machine. `LLM` allows it, since its caller
            is this machine's user; a server does not, and has no flag for it.
    """

    model: str
    task: Literal["auto", "generate", "embed", "embedding"] = "auto"
    runner: Literal["auto", "generate", "pooling"] = "auto"
    revision: str | None = None
    tokenizer: str | None = None
    device: str = "auto"
    tensor_parallel_size: Positive = 1
    tensor_parallel_timeout: Positive = 60
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float", "half"] = "auto"
    quantization: str | None = "auto"
    quantization_group_size: Literal[32, 64, 128] | None = None
    lora: Sequence[str] = ()
    lora_scale: Sequence[float] = ()
    max_model_len: Positive | None = None
    load_format: Literal["auto", "safetensors"] = "auto"
    trust_remote_code: bool = False
    seed: int | None = None
    prefer: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    tool_call_parser: Literal["auto", "hermes"] = "auto"
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
    pooling_type: PoolingType | None = None
    normalize: bool | None = None
    limit_mm_per_prompt: Mapping[str, int] | None = None
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_num_seqs: Positive = 64
    max_num_batched_tokens: Positive = 2048
    max_encoder_tokens: Positive = 8192
    enable_prefix_caching: bool = True
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    speculative_config: Mapping[str, Any] | None = None
    kv_cache_memory: Positive | None = None
    encoder_cache_memory: NonNegative = 512 * 2**20
    media_cache_memory: NonNegative = 512 * 2**20
    pending_media_memory: Positive = 2**30
    preprocess_threads: Positive = 2
    host_shares: Positive = 1
    local_media: bool = False

    def __post_init__(self) -> None:
        dtype = str(self.dtype).removeprefix("torch.")
        self._put("dtype", _DTYPES.get(dtype, dtype))
        if self.quantization is None or isinstance(self.quantization, str):
            self._put("quantization", _QUANTIZATIONS.get(self.quantization, self.quantization))
        self._put("mm_processor_kwargs", self.mm_processor_kwargs or {})
        self._put("lora", [str(one) for one in _listed(self.lora)])
        self._put("lora_scale", [_number(one) for one in _listed(self.lora_scale)])
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
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"quantization={self.quantization!r}: expected one of {', '.join(QUANTIZATIONS)}"
                f"{did_you_mean(str(self.quantization), QUANTIZATIONS)}"
            )
        if self.quantization_group_size is not None and self.quantization not in ("int8", "int4"):
            raise ConfigError(
                f"quantization_group_size={self.quantization_group_size} is for rounding, and quantization "
                f'is {self.quantization!r}; pass quantization="int4" or "int8"'
            )
        if self.lora_scale and len(self.lora_scale) not in (1, len(self.lora)):
            raise ConfigError(
                f"lora_scale has {len(self.lora_scale)} values for {len(self.lora)} adapters; expected "
                "one, or one for each"
            )
        self._put("mm_processor_kwargs", dict(self.mm_processor_kwargs))
        self._put("override_generation_config", dict(self.override_generation_config))
        self._put("speculative_config", dict(self.speculative_config) if self.speculative_config else None)
        _ = self.speculative

    @property
    def speculative(self) -> SpeculativeConfig | None:
        """``speculative_config`` in its own type, None if nothing is guessed.

        Raises:
            ConfigError: it has an unknown name or a value that cannot be.
        """
        given = self.speculative_config
        return None if given is None else SpeculativeConfig.from_dict(given)

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


def _listed(value: Any) -> Sequence[Any]:
    """One value as a list of it."""
    if value is None:
        return ()
    return value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _number(value: Any) -> Any:
    """What a flag says, as a number if it is one."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _count(limit: Any) -> Any:
    """The limit in vLLM's newer form, ``{"count": 2, ...}``, whose sizes are for its memory profiling."""
    return limit.get("count") if isinstance(limit, Mapping) else limit
