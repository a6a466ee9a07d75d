"""vLLM's names that opsin has otherwise or not at all, as data: what scripts pass, and what becomes of it.

vLLM's other names are opsin's own. docs/vllm.md has both in tables, which a test holds against this module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from opsin.errors import ConfigError, OpsinError, require_known

T = TypeVar("T")


@dataclass(frozen=True)
class Renamed:
    """It is here under another name; ``convert`` makes the value, None where it asks for nothing."""

    to: str
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class NoEffect:
    """Any value is accepted, since none changes an answer."""

    why: str


@dataclass(frozen=True)
class Refused:
    """Only None and values that ask for nothing are accepted."""

    why: str
    neutral: tuple[Any, ...] = ()


Names = Mapping[str, Renamed | NoEffect | Refused]


def translated(
    where: str,
    given: Mapping[str, Any],
    names: Names,
    known: Collection[str],
    error: type[OpsinError] = ConfigError,
) -> dict[str, Any]:
    """Named arguments in opsin's names, which are ``known``.

    Raises:
        OpsinError: of type ``error``: a name is unknown, asks for what opsin has not, or is given twice.
    """
    result: dict[str, Any] = {}
    for name, value in given.items():
        entry = None if name in known else names.get(name)
        if isinstance(entry, Renamed):
            value = None if value is None else entry.convert(value)
            if value is not None and given.get(entry.to) is not None:
                raise error(f"{where}: {name} is another name of {entry.to}; pass one of them")
            if value is not None:
                result[entry.to] = value
        elif isinstance(entry, Refused):
            # Not `in`: True equals 1.
            if value is not None and not any(type(value) is type(n) and value == n for n in entry.neutral):
                raise error(f"{where}: {name}={value!r:.80} is not supported: {entry.why}")
        elif entry is None:
            require_known(where, [name], known, error, also_meant=names)
            result[name] = value
    return result


def takes_vllm_names(names: Names) -> Callable[[type[T]], type[T]]:
    """Let a dataclass take vLLM's names of its fields, too. Unknown names are a `ConfigError`."""

    def decorate(cls: type[T]) -> type[T]:
        plain: Callable[..., None] = vars(cls)["__init__"]

        @wraps(plain)
        def init(self: T, *values: Any, **given: Any) -> None:
            known = vars(cls)["__dataclass_fields__"]
            plain(self, *values, **translated(cls.__name__, given, names, known))

        type.__setattr__(cls, "__init__", init)
        return cls

    return decorate


def _each(entry: NoEffect | Refused, names: str) -> Names:
    return dict.fromkeys(names.split(), entry)


_ONE_DEVICE = (
    "tensor_parallel_size divides a model among devices; several engines are what opsin serve "
    "--data-parallel-size, opsin batch --ray and opsin.ray run"
)
_NO_LORA = "adapters are merged into the weights at load: pass lora=FOLDER"
_SPECULATIVE = 'pass speculative_config={"method": "ngram", "num_speculative_tokens": 8}'
_NO_DRAFT_MODEL = "drafts come from the prompt and the answer (ngram), not from a model"
_NOT_HERE = "opsin has nothing of the kind; leave it out"
_OWN_CONFIG = "a checkpoint is taken as its config.json says; change that file in a copy of the folder"
_CLASSIFIES = "opsin's models make answers and embeddings, no classes"

ENGINE: Names = {
    "kv_cache_memory_bytes": Renamed("kv_cache_memory"),
    "mm_processor_cache_gb": Renamed("media_cache_memory", lambda gib: int(gib * 2**30)),
    "disable_mm_preprocessor_cache": Renamed("media_cache_memory", lambda off: 0 if off else None),
    **_each(
        NoEffect("memory: the KV cache takes its share of what is free, or kv_cache_memory bytes"),
        "gpu_memory_utilization swap_space block_size watermark skip_mm_profiling enable_cumem_allocator "
        "mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_ipc_gpu_memory_gb mm_tensor_ipc",
    ),
    **_each(
        NoEffect("compilation and graphs: the device's plugin decides"),
        "enforce_eager max_seq_len_to_capture compilation_config cuda_graph_sizes cudagraph_capture_sizes "
        "max_cudagraph_capture_size optimization_level performance_mode attention_backend attention_config "
        "kernel_config linear_backend moe_backend mm_encoder_attn_backend disable_cascade_attn "
        "use_fp64_gumbel enable_flashinfer_autotune mm_processor_device",
    ),
    **_each(
        NoEffect("scheduling: prompts longer than max_num_batched_tokens are computed in chunks"),
        "enable_chunked_prefill disable_chunked_mm_input max_num_partial_prefills max_long_partial_prefills "
        "long_prefill_token_threshold max_num_scheduled_tokens num_scheduler_steps multi_step_stream_outputs "
        "scheduler_delay_factor scheduler_reserve_full_isl preemption_mode async_scheduling "
        "disable_async_output_proc stream_interval num_lookahead_slots use_v2_block_manager "
        "prefix_caching_hash_algo mm_hasher_algorithm disable_hybrid_kv_cache_manager",
    ),
    **_each(
        NoEffect("processes: an engine starts its ranks itself"),
        "disable_custom_all_reduce distributed_executor_backend max_parallel_loading_workers "
        "ray_workers_use_nsight mm_encoder_tp_mode tokenizer_pool_size tokenizer_pool_type "
        "tokenizer_pool_extra_config renderer_num_workers shutdown_timeout",
    ),
    **_each(NoEffect("logging"), "disable_log_stats disable_log_requests aggregate_engine_logging"),
    **_each(
        NoEffect("loading: safetensors are read as they are; no code of a checkpoint is run"),
        "code_revision safetensors_load_strategy use_tqdm_on_load pt_load_map_location ignore_patterns "
        "model_loader_extra_config",
    ),
    "allowed_local_media_path": NoEffect("`LLM` reads the files that its user may read"),
    "allowed_media_domains": NoEffect(
        "of an engine, which fetches nothing; of `LLM`, the hosts of its `fetch_urls`"
    ),
    "served_model_name": NoEffect("a name for clients of `opsin serve`"),
    "max_logprobs": NoEffect("a request may ask for up to 20, or with -1 for all"),
    "guided_decoding_backend": NoEffect("constraints are llguidance's"),
    "enable_mm_embeds": NoEffect("embeddings are always accepted"),
    "interleave_mm_strings": NoEffect("media stand where their parts do"),
    **_each(
        NoEffect("of LoRA at run time: adapters are merged at load (lora=)"),
        "max_loras max_lora_rank max_cpu_loras lora_dtype lora_extra_vocab_size long_lora_scaling_factors "
        "fully_sharded_loras enable_lora_bias lora_target_modules",
    ),
    "enable_lora": Refused(_NO_LORA, (False,)),
    "default_mm_loras": Refused(_NO_LORA, ({},)),
    "enable_prompt_adapter": Refused(_NO_LORA, (False,)),
    **_each(
        Refused(_ONE_DEVICE, (1,)),
        "pipeline_parallel_size data_parallel_size decode_context_parallel_size "
        "prefill_context_parallel_size nnodes",
    ),
    **_each(
        Refused(_ONE_DEVICE, (False,)), "enable_expert_parallel enable_eplb enable_dbo enable_elastic_ep"
    ),
    "kv_cache_dtype": Refused("the KV cache has the model's dtype", ("auto",)),
    "calculate_kv_scales": Refused("the KV cache has the model's dtype", (False,)),
    "cpu_offload_gb": Refused("weights stay on the device; take a smaller dtype", (0, 0.0)),
    "kv_offloading_size": Refused("the KV cache stays on the device"),
    "num_gpu_blocks_override": Refused("set kv_cache_memory, in bytes"),
    "tokenizer_mode": Refused("the checkpoint's tokenizer is used", ("auto", "hf")),
    "tokenizer_revision": Refused("pass a folder with that revision as tokenizer"),
    "skip_tokenizer_init": Refused("pass SamplingParams(detokenize=False) to get no text", (False,)),
    "enable_prompt_embeds": Refused("embeddings are given for pictures and videos, not for text", (False,)),
    "convert": Refused('pass task="embed" for embeddings', ("auto", "none")),
    "config_format": Refused(_OWN_CONFIG, ("auto", "hf")),
    "hf_config_path": Refused(_OWN_CONFIG),
    **_each(Refused(_OWN_CONFIG, ({},)), "hf_overrides rope_scaling rope_theta model_class_overrides"),
    "disable_sliding_window": Refused(_OWN_CONFIG, (False,)),
    "hf_token": Refused("set HF_TOKEN in the environment", (False,)),
    "download_dir": Refused("set HF_HOME in the environment"),
    "model_impl": Refused("models are plugins; `opsin plugins` lists them", ("auto",)),
    "pooler_config": Refused("pass pooling_type= and normalize="),
    "override_pooler_config": Refused("pass pooling_type= and normalize="),
    "structured_outputs_config": Refused("constraints are llguidance's; leave it out", ({},)),
    "logits_processors": Refused("pass SamplingParams(logits_processors=)", ([],)),
    "logprobs_mode": Refused("log-probabilities are those of the raw logits", ("raw_logprobs",)),
    "media_io_kwargs": Refused("sampled_video_frames says how many frames of a video are taken", ({},)),
    "video_pruning_rate": Refused("all frames are kept; give fewer", (0, 0.0)),
    "language_model_only": Refused("leave out the media instead", (False,)),
    "mm_encoder_only": Refused(_NOT_HERE, (False,)),
    **_each(
        Refused(_SPECULATIVE, (0,)),
        "speculative_model num_speculative_tokens spec_method spec_model spec_tokens "
        "ngram_prompt_lookup_max ngram_prompt_lookup_min",
    ),
    "reasoning_parser": Refused("thoughts are part of the answer's text", ("",)),
    **_each(Refused(_NOT_HERE, ("auto", "")), "worker_cls worker_extension_cls"),
    **_each(
        Refused(_NOT_HERE, (False,)), "enable_sleep_mode enable_return_routed_experts enable_trace_replay"
    ),
    **_each(
        Refused(_NOT_HERE, ({},)),
        "scheduler_cls additional_config kv_transfer_config kv_events_config ec_transfer_config "
        "weight_transfer_config io_processor_plugin profiler_config otlp_traces_endpoint "
        "collect_detailed_traces quantization_config",
    ),
}
"""Arguments of ``LLM`` and ``EngineArgs``, from vLLM 0.6.4 on."""

SPECULATIVE: Names = {
    "model": Refused(_NO_DRAFT_MODEL, ("ngram", "[ngram]")),
    **_each(
        NoEffect("drafts are shortened by themselves where they do not pay"),
        "disable_by_batch_size speculative_disable_by_batch_size disable_padded_drafter_batch",
    ),
    **_each(NoEffect("log-probabilities are as without drafts"), "disable_logprobs"),
    **_each(
        NoEffect("a token is kept by rejection sampling, so that the distribution stays"),
        "rejection_sample_method acceptance_method",
    ),
    **_each(NoEffect("compilation and graphs: the device's plugin decides"), "enforce_eager"),
    **_each(Refused(_NO_DRAFT_MODEL, (1,)), "draft_tensor_parallel_size"),
    **_each(
        Refused(_NO_DRAFT_MODEL),
        "quantization max_model_len revision code_revision speculative_token_tree draft_model_config "
        "draft_parallel_config target_model_config target_parallel_config",
    ),
}
"""Keys of ``speculative_config``."""

SAMPLING: Names = {
    "structured_outputs": Renamed("structured"),
    "guided_decoding": Renamed("structured"),
    "spaces_between_special_tokens": NoEffect("the tokenizer's own decoder adds none"),
    "skip_reading_prefix_cache": NoEffect("a cached prefix changes no answer"),
    "stream_interval": NoEffect("a slow reader skips outputs anyway"),
    "skip_clone": NoEffect("a request keeps a copy"),
    "best_of": Refused("ask for n samples and take the one with the best cumulative_logprob", (1,)),
    "use_beam_search": Refused("use LLM.beam_search with BeamSearchParams", (False,)),
    "length_penalty": Refused("use LLM.beam_search with BeamSearchParams", (1, 1.0)),
    "early_stopping": Refused("use LLM.beam_search with BeamSearchParams", (False,)),
    "flat_logprobs": Refused("log-probabilities come as dicts", (False,)),
    "logprob_token_ids": Refused("ask for logprobs=-1 and pick them"),
    "prompt_logprob_token_ids": Refused("ask for prompt_logprobs=-1 and pick them"),
    "prompt_logprob_start": Refused("ask for prompt_logprobs and leave out the first", (0,)),
    "extra_args": Refused(_NOT_HERE, ({},)),
    "thinking_token_budget": Refused(_NOT_HERE, (-1,)),
    "repetition_detection": Refused("use repetition_penalty, or max_tokens"),
    "routed_experts_prompt_start": Refused(_NOT_HERE, (0,)),
    "trace_decode_token_ids": Refused(_NOT_HERE),
}
"""Arguments of ``SamplingParams``."""

POOLING: Names = {
    "normalize": Refused("pass normalize= to LLM"),
    "skip_reading_prefix_cache": NoEffect("a cached prefix changes no embedding"),
    **_each(Refused(_CLASSIFIES), "softmax activation use_activation step_tag_id returned_token_ids"),
    "task": Refused("there are embeddings of whole prompts", ("embed",)),
    "requires_token_ids": Refused(_NOT_HERE, (False,)),
    **_each(Refused(_NOT_HERE, ({},)), "extra_kwargs additional_data"),
}
"""Arguments of ``PoolingParams``."""

BEAM_SEARCH: Names = {
    "temperature": Refused("beams are those of the model's own distribution", (0, 0.0)),
    "include_stop_str_in_output": Refused("a beam's tokens have its end, its text does not", (False,)),
}
"""Arguments of ``BeamSearchParams``."""

STRUCTURED: Names = {
    **_each(NoEffect("constraints are llguidance's"), "backend backend_was_auto disable_fallback"),
    "disable_any_whitespace": Refused("JSON may have white space; strip it from the answer", (False,)),
    "disable_additional_properties": Refused('say "additionalProperties": false in the schema', (False,)),
    "whitespace_pattern": Refused("say it in a grammar"),
    "structural_tag": Refused("say it in a grammar"),
}
"""Arguments of ``StructuredOutputsParams`` and ``GuidedDecodingParams``."""

PROMPT: Names = {
    "prompt_embeds": Refused("embeddings are given for pictures and videos, not for text"),
    "encoder_prompt": Refused("opsin's models are decoders"),
    "decoder_prompt": Refused("opsin's models are decoders"),
    "token_type_ids": Refused(_NOT_HERE),
}
"""Keys of a prompt's dict."""

CALL: Names = {
    "lora_request": Refused(_NO_LORA),
    "prompt_adapter_request": Refused(_NO_LORA),
    "prompt_token_ids": Refused('pass {"prompt_token_ids": ids} as the prompt'),
    "guided_options_request": Refused("pass SamplingParams(structured=)"),
    "tokenization_kwargs": Refused("pass truncate_prompt_tokens in the parameters, or token ids", ({},)),
    "chat_template_content_format": Refused("pass it to LLM", ("auto",)),
    "pooling_task": Refused("there are embeddings of whole prompts", ("embed",)),
}
"""Arguments of ``LLM``'s methods."""

METHODS: Mapping[str, str] = {
    **dict.fromkeys(("classify", "reward"), _CLASSIFIES),
    **dict.fromkeys(("sleep", "wake_up"), "use LLM.close, and load the model again"),
    **dict.fromkeys(("start_profile", "stop_profile"), "use torch.profiler around the call"),
    **dict.fromkeys(
        ("collective_rpc", "apply_model", "get_world_size"),
        "ranks are the engine's own; see llm.engine.executor",
    ),
    "set_tokenizer": "pass tokenizer= to LLM",
    "preprocess_chat": "use llm.engine.frontend",
    "llm_engine": "it is llm.engine, with other methods",
    **dict.fromkeys(("enqueue", "wait_for_completion"), "use LLM.generate_iter"),
    **dict.fromkeys(("init_weight_transfer_engine", "update_weights"), "load the new checkpoint"),
}
"""What ``LLM`` has in vLLM and not here, and what to do instead."""
