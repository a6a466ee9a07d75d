"""One rank: opens a device, builds the model, streams its share of the weights in, computes steps."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from opsin.api import (
    AttentionBatch,
    BuildContext,
    Device,
    ForwardStep,
    KernelQuery,
    MappedMedia,
    MediaFeatures,
    Modality,
    Model,
    ModelSpec,
    Parallel,
    WideMedia,
)
from opsin.checkpoint.files import Checkpoint, settings_explained
from opsin.checkpoint.lora import Adapters
from opsin.checkpoint.quantized import QuantizedTensors
from opsin.checkpoint.weights import load_weights, read_safetensors, safetensors_keys, torch_dtype
from opsin.config import EngineConfig
from opsin.errors import ConfigError, PluginError, RequestError
from opsin.kernels import Kernels, allocate_kv
from opsin.plugins import Plugins
from opsin.rank.sizing import resolve, resolve_dtype, resolve_rounding
from opsin.rank.step import Embed, StepInput, StepOutput
from opsin.rank.uploads import Uploads

T = TypeVar("T")

logger = logging.getLogger(__name__)

_MODEL = ("kv_geometry", "hidden_size", "vocab_size", "weight_name", "embed", "forward", "logits")
"""What every `opsin.api.Model` has."""

_FLOATS = frozenset({"float32", "float16", "bfloat16"})


class Rank:
    """One device, in this process; the only one unless ``place`` says otherwise.

    Attributes:
        device: the opened device.
        kernels: its op table.
        model: with this rank's share of the weights.
        weights: which keys went where.
        dtype: in which the model runs.
        top_k: the bound op, for `opsin.engine.sampler`.
        place: among the ranks.
    """

    def __init__(
        self, config: EngineConfig, checkpoint: Checkpoint, plugins: Plugins, place: Parallel | None = None
    ) -> None:
        """Open the device, build the model, stream its weights in, and allocate the KV cache.

        Raises:
            MissingPluginError: no plugin has the model's architecture or the device.
            ConfigError: a setting does not fit device or model.
            CheckpointError: weights and config.json disagree.
        """
        started = time.perf_counter()
        self.place = Parallel() if place is None else place
        model_spec = plugins.model(checkpoint.architecture)
        device_spec, device_index, _ = plugins.select_device(config.device)
        self.device = plugins.open_device(device_spec, device_index)
        self._join()
        name = resolve_dtype(config.dtype, checkpoint.dtype, self.device.capabilities)
        self.dtype = torch_dtype(name)
        self.kernels = Kernels(device_spec.name, plugins.kernel_specs(device_spec.name))
        # A container of a plugin's own is read by the plugin, whatever config.json says.
        stored = checkpoint.quantization() if model_spec.load_checkpoint is None else None
        method = None if stored is None else stored["quant_method"]
        context = BuildContext(
            config=checkpoint.config,
            kernels=self.kernels,
            dtype=self.dtype,
            device=self.device.torch_device,
            parallel=self.place,
            rounding=resolve_rounding(config, method),
        )
        weight_format = None if method is None else plugins.weight_format(method)
        with settings_explained(checkpoint.path, model_spec.build):
            self.model: Model = model_spec.build(context)
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
            adapters = None
            if config.lora:
                given = list(config.lora_scale) or [1.0]
                scales = given * (len(config.lora) if len(given) == 1 else 1)
                adapters = Adapters(config.lora, scales, self.model.weight_name)
                tensors = adapters.merged(tensors)
            self.weights = load_weights(
                self.model,
                self._checked(tensors),
                needs_head=config.task != "embed",
            )
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
            kv_bytes_per_token=2 * geometry.num_layers * row_elements * self.dtype.itemsize,
            kv_row_elements=row_elements,
            free_bytes=self._least(self.device.memory().free_bytes),
            sharing=self.place.world_size * config.host_shares if self.device.torch_device == "cpu" else 1,
        )
        self._block_size = self.resolved.block_size
        with _out_of_memory_explained(self.device, "KV cache", "pass a smaller kv_cache_memory"):
            self.kv = allocate_kv(
                self.device, self.resolved.num_blocks, self._block_size, geometry, self.dtype
            )
        self.top_k = self.kernels.top_k(KernelQuery(op="top_k", dtype=name, size=self.model.vocab_size))
        width = self.model.hidden_size
        self._all_reduce = (
            None
            if self.place.world_size == 1
            else self.kernels.all_reduce(KernelQuery(op="all_reduce", dtype=name, size=width))
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
        if adapters is not None:
            logger.info("%s", adapters.report())
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
    def media_width(self) -> int:
        """Columns of what the model's encoder gives."""
        return self.model.media_width if isinstance(self.model, WideMedia) else self.model.hidden_size

    @torch.inference_mode()
    def compute(self, step: StepInput, embed: Embed | None = None) -> StepOutput:
        """Compute a step; with several ranks, at the same time as all others.

        Args:
            step: the same on all ranks.
            embed: puts embeddings and media together; None on ranks other than the first.

        Raises:
            RequestError: the model gave tensors of other shapes than it should.
            DeviceLostError: the device, or another rank, is gone.
        """
        target, hidden_size = self.device.torch_device, self.model.hidden_size
        numbers = Uploads(target, _room(step), pinned=self.device.capabilities.pinned_memory)
        ids = None if embed is None else numbers.put(step.token_ids)
        on_host = self.device.capabilities.host_angles
        positions = torch.from_numpy(step.positions) if on_host else numbers.put(step.positions.ravel())
        rows, media_rows = numbers.put(step.logit_rows), numbers.put(step.media_rows)
        batch = AttentionBatch(
            query_lens=step.query_lens,
            context_lens=step.context_lens,
            block_tables=step.block_tables,
            slots=step.slots,
            block_size=self._block_size,
            device=target,
            upload=numbers.put,
        )
        plan = self.kernels.plan_attention(batch)
        numbers.send()
        embeds, features = (None, None) if embed is None or ids is None else embed(ids.long())
        embeds = self._from_first(embeds, (step.num_tokens, hidden_size))
        media = None
        if step.media_rows:
            shape = (len(step.media_rows), self.media_width - hidden_size)
            media = MediaFeatures(rows=media_rows.long(), features=self._from_first(features, shape))
        hidden = self.model.forward(
            ForwardStep(
                embeds=embeds,
                positions=positions.long().view(step.positions.shape),
                kv=self.kv,
                plan=plan,
                media=media,
            )
        )
        if hidden.shape != embeds.shape:
            raise RequestError(f"the model gave {tuple(hidden.shape)} for embeddings {tuple(embeds.shape)}")
        return StepOutput(hidden=hidden, logits=self._logits(hidden, rows))

    @torch.inference_mode()
    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """Encode several items of one modality -> (E, H) each."""
        return self.model.encode(modality, items)

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        expected = (len(rows), self.model.vocab_size)
        if not len(rows):
            return hidden.new_empty(expected)
        logits = self.model.logits(hidden.index_select(0, rows))
        if tuple(logits.shape) != expected:
            raise RequestError(f"the model gave logits {tuple(logits.shape)}, expected {expected}")
        return logits

    def _from_first(self, tensor: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """What rank 0 has, on all ranks: the sum of it and of zeros."""
        if tensor is None:
            tensor = torch.zeros(shape, dtype=self.dtype, device=self.device.torch_device)
        return tensor if self._all_reduce is None else self._all_reduce(tensor, self.place)

    def _join(self) -> None:
        """Meet the other ranks, once the device is open."""

    def _least(self, free_bytes: int) -> int:
        """What is free on every rank; all have loaded their weights then."""
        return free_bytes

    def _checked(self, tensors: Iterable[T]) -> Iterator[T]:
        """The tensors, as long as all ranks are there."""
        link = self.place.link
        for tensor in tensors:
            if link is not None:
                link.check()
            yield tensor

    def check(self) -> None:
        """Raise `DeviceLostError` if another rank is gone."""

    def close(self) -> None:
        """Release model and caches. May be called again."""
        for name in ("model", "kv"):
            vars(self).pop(name, None)


def _room(step: StepInput) -> int:
    """Numbers that a step may have to upload, those of a device's plan included."""
    sequences, tokens = len(step.query_lens), step.num_tokens
    columns = max(map(len, step.block_tables), default=0) + 2
    alone = tokens * (2 + len(step.positions)) + len(step.logit_rows) + len(step.media_rows)
    return alone + sequences * (columns + 64) + 256


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
