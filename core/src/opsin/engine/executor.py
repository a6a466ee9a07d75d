"""The wall between engine and runner: opens the device, loads the model, runs steps.

It works in this process. Several processes (tensor parallelism) would be another executor with the same
methods: the engine never touches a tensor.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opsin.api import BuildContext, Device, KernelQuery, ModelSpec
from opsin.checkpoint.files import Checkpoint, settings_explained
from opsin.checkpoint.quantized import QuantizedTensors
from opsin.checkpoint.weights import load_weights, read_safetensors, safetensors_keys, torch_dtype
from opsin.config import EngineConfig
from opsin.engine.cache import EncoderCache
from opsin.engine.runner import Runner, StepTokens, media_width
from opsin.engine.scheduler import Step
from opsin.engine.sizing import resolve, resolve_dtype, resolve_rounding
from opsin.errors import ConfigError, PluginError
from opsin.kernels import Kernels, allocate_kv
from opsin.plugins import Plugins

logger = logging.getLogger(__name__)

_MODEL = ("kv_geometry", "hidden_size", "vocab_size", "weight_name", "embed", "forward", "logits")
"""What every `opsin.api.Model` has."""


_FLOATS = frozenset({"float32", "float16", "bfloat16"})


class LocalExecutor:
    """One device, in this process."""

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint, plugins: Plugins) -> None:
        """Open the device, build the model and stream its weights in.

        Raises:
            MissingPluginError: no plugin has the model's architecture or the device.
            ConfigError: a setting does not fit device or model.
            CheckpointError: weights and config.json disagree.
        """
        started = time.perf_counter()
        model_spec = plugins.model(checkpoint.architecture)
        device_spec, device_index, _ = plugins.select_device(config.device)
        self.device = plugins.open_device(device_spec, device_index)
        name = resolve_dtype(config.dtype, checkpoint.dtype, self.device.capabilities)
        dtype = torch_dtype(name)
        self.kernels = Kernels(device_spec.name, plugins.kernel_specs(device_spec.name))
        # A container of a plugin's own is read by the plugin, whatever config.json says.
        stored = checkpoint.quantization() if model_spec.load_checkpoint is None else None
        method = None if stored is None else stored["quant_method"]
        context = BuildContext(
            config=checkpoint.config,
            kernels=self.kernels,
            dtype=dtype,
            device=self.device.torch_device,
            rounding=resolve_rounding(config, method),
        )
        weight_format = None if method is None else plugins.weight_format(method)
        with settings_explained(checkpoint.path, model_spec.build):
            self.model = model_spec.build(context)
        lacking = [name for name in _MODEL if not hasattr(self.model, name)]
        if lacking or not isinstance(self.model, torch.nn.Module):
            raise PluginError(
                f"{model_spec.build.__module__} built a {type(self.model).__name__} for "
                f"{model_spec.architecture} without {', '.join(lacking) or 'modules'}; expected a "
                "torch.nn.Module that is an opsin.api.Model"
            )
        with _out_of_memory_explained(self.device, "weights", 'pass a smaller checkpoint or dtype="float16"'):
            load = model_spec.load_checkpoint
            files = [] if load else checkpoint.weight_files()
            tensors = load(checkpoint.path) if load else read_safetensors(files, checkpoint.weight_map())
            quantized = None
            if weight_format is not None and stored is not None:
                keys, needed = safetensors_keys(files), config.quantization != "none"
                quantized = QuantizedTensors(weight_format, stored, keys, needed=needed)
                tensors = quantized.decoded(tensors)
            self.weights = load_weights(self.model, tensors, needs_head=config.task != "embed")
        self.weights.check()
        geometry = self.model.kv_geometry
        # One token's keys in one layer, as the device lays them out.
        row_elements = (
            geometry.num_kv_heads * geometry.head_size
            if self.device.kv_row_elements is None
            else self.device.kv_row_elements(geometry)
        )
        self.resolved = resolve(
            config,
            self.device.capabilities,
            dtype=name,
            model_max_len=_max_len(model_spec, checkpoint),
            kv_bytes_per_token=2 * geometry.num_layers * row_elements * dtype.itemsize,
            kv_row_elements=row_elements,
            free_bytes=self.device.memory().free_bytes,
        )
        self.encoder_cache = EncoderCache(config.encoder_cache_memory)
        self.media_width = media_width(self.model)
        self.embed_bytes = self.media_width * dtype.itemsize
        with _out_of_memory_explained(self.device, "KV cache", "pass a smaller kv_cache_memory"):
            kv = allocate_kv(self.device, self.resolved.num_blocks, self.resolved.block_size, geometry, dtype)
        self._runner = Runner(
            model=self.model,
            device=self.device,
            kv=kv,
            plan_attention=self.kernels.plan_attention,
            top_k=self.kernels.top_k(KernelQuery(op="top_k", dtype=name, size=self.model.vocab_size)),
            encoder_cache=self.encoder_cache,
            block_size=self.resolved.block_size,
            dtype=dtype,
        )
        logger.info(
            "%s on %s in %s, %d tensors, %.1f s",
            model_spec.architecture,
            self.device.torch_device,
            name,
            len(self.weights.loaded),
            time.perf_counter() - started,
        )
        logger.info("%s", self.resolved.explanation)
        logger.info("%s", self.kernels.report())
        if quantized is not None:
            logger.info("%s", quantized.report())
        logger.info("%s", self.kernels.report_weights())
        if config.quantization in ("int8", "int4") and not set(self.weight_forms) - _FLOATS:
            logger.warning(
                "quantization=%r has no effect here: %s reads no weights of fewer bits; they stay floats",
                config.quantization,
                device_spec.name,
            )

    @property
    def weight_forms(self) -> dict[str, int]:
        """Form of weights -> linear layers that use it; of floats, their dtype."""
        forms: Counter[str] = Counter()
        for use, count in self.kernels.weights.items():
            forms[use.used] += count
        return dict(sorted(forms.items()))

    @property
    def num_encoded(self) -> int:
        """Media items encoded so far."""
        return self._runner.num_encoded

    def run(self, step: Step) -> StepTokens:
        """Compute one step."""
        return self._runner.run(step)

    def close(self) -> None:
        """Release model and caches."""
        del self._runner, self.model


@contextmanager
def _out_of_memory_explained(device: Device, what: str, cure: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        known = device.memory()
        raise ConfigError(
            f"no room for the {what} on {device.torch_device}, where {known.free_bytes / 2**30:.2f} GiB of "
            f"{known.total_bytes / 2**30:.2f} GiB are free: {error}; {cure}"
        ) from error


def _max_len(spec: ModelSpec, checkpoint: Checkpoint) -> int:
    if spec.max_len is not None:
        with settings_explained(checkpoint.path, spec.max_len):
            return spec.max_len(checkpoint.config)
    config = checkpoint.config
    text = config.get("text_config") or {}
    return int(config.get("max_position_embeddings") or text.get("max_position_embeddings") or 4096)
